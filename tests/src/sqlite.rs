//! SQLite, by its own shell.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::process::{Conversation, cmd};

/// How a database keeps its transactions whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Journal {
    /// A write-ahead log.
    Wal,
    /// A rollback journal that is deleted at each commit. The deletion is the commit, so the folder must
    /// be synced too (`synchronous=extra`), or a power loss could take back what was reported.
    Delete,
    /// A rollback journal whose header is overwritten at each commit.
    Persist,
}

impl Journal {
    fn pragmas(self) -> &'static str {
        match self {
            Journal::Wal => "pragma journal_mode=wal; pragma synchronous=full;",
            Journal::Delete => "pragma journal_mode=delete; pragma synchronous=extra;",
            Journal::Persist => "pragma journal_mode=persist; pragma synchronous=full;",
        }
    }
}

/// A database file.
#[derive(Clone, Debug)]
pub struct Database {
    path: PathBuf,
    journal: Journal,
}

impl Database {
    /// The database in `path`.
    pub fn new(path: &Path, journal: Journal) -> Database {
        Database {
            path: path.to_owned(),
            journal,
        }
    }

    /// A session that is asked and answers, its journal set up.
    pub fn session(&self, log: &Path) -> Result<Conversation> {
        let shell = cmd("sqlite3")
            .args(["-batch", "-bail", "-cmd", ".timeout 20000"])
            .arg(&self.path);
        let mut session = shell.converse(log)?;
        let ready = format!("{}\nselect 'ready';\n", self.journal.pragmas());
        session.ask(&ready, "ready").context("set the journal up")?;
        Ok(session)
    }

    /// Runs SQL; gives its rows, fields separated by `|`. Recovers first what a crash left.
    pub fn sql(&self, sql: &str) -> Result<Vec<String>> {
        let rows = cmd("sqlite3")
            .args(["-batch", "-bail", "-cmd", ".timeout 20000"])
            .arg(&self.path)
            .arg(sql)
            .output()?;
        Ok(rows.lines().map(str::to_owned).collect())
    }

    /// An error if SQLite finds the file damaged.
    pub fn check_integrity(&self) -> Result<()> {
        let found = self.sql("pragma integrity_check;")?;
        ensure!(found == ["ok"], "integrity_check: {found:?}");
        Ok(())
    }
}
