//! Numbered transactions: which must be in a restored database, and which must not.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::moments::WallNs;
use crate::process::{Conversation, poll_until};
use crate::rng::Rng;

/// Numbers of one session start at a multiple of this.
const SESSION_NUMBERS: u64 = 1_000_000;

/// The tables that numbered transactions need.
pub const SCHEMA: &str = "create table entry (number bigint primary key, filler text not null);\
    create table tally (session bigint primary key, entries bigint not null);";
/// The query whose rows [`CommitLog::check`] takes as `present`.
pub const PRESENT: &str = "select number from entry order by number";
/// A query that has no row as long as every transaction is there whole or not at all.
pub const TORN: &str = "select t.session, t.entries from tally t \
    where t.entries <> (select count(*) from entry e where e.number / 1000000 = t.session)";

/// One transaction, as its client saw it.
#[derive(Clone, Copy, Debug)]
pub struct Commit {
    /// Its number.
    pub number: u64,
    /// Just before it was sent.
    pub began: WallNs,
    /// Just after the database said that it was committed.
    pub returned: WallNs,
}

/// All transactions that clients committed.
#[derive(Clone, Debug, Default)]
pub struct CommitLog {
    commits: Vec<Commit>,
}

impl CommitLog {
    /// How many.
    pub fn len(&self) -> usize {
        self.commits.len()
    }

    /// Were there none?
    pub fn is_empty(&self) -> bool {
        self.commits.is_empty()
    }

    /// A random moment from shortly before the first to shortly after the last of them; now and then the
    /// very nanosecond in which one returned or began, where an error would show first.
    pub fn random_moment(&self, rng: &mut Rng) -> Result<WallNs> {
        let first = self
            .commits
            .iter()
            .map(|commit| commit.began)
            .min()
            .context("no commits")?;
        let last = self
            .commits
            .iter()
            .map(|commit| commit.returned)
            .max()
            .context("no commits")?;
        Ok(match rng.below(4) {
            0 => rng.pick(&self.commits).returned,
            1 => WallNs(rng.pick(&self.commits).began.0 - 1),
            _ => WallNs::random_between(rng, first, last),
        })
    }

    /// Compares with the numbers found in a database restored to `at`: whatever had returned must be
    /// there, whatever had not begun must not. What was under way may be either.
    pub fn check(&self, at: WallNs, present: &BTreeSet<u64>) -> Result<()> {
        let mut known = BTreeSet::new();
        for commit in &self.commits {
            known.insert(commit.number);
            let there = present.contains(&commit.number);
            ensure!(
                there || commit.returned > at,
                "at {at}: {commit:?} had returned and is lost"
            );
            ensure!(
                !there || commit.began <= at,
                "at {at}: {commit:?} had not begun and is there"
            );
        }
        let strangers: Vec<_> = present.difference(&known).collect();
        ensure!(strangers.is_empty(), "at {at}: nobody committed {strangers:?}");
        Ok(())
    }
}

/// Turns the rows of [`PRESENT`] into numbers.
pub fn numbers(rows: &[String]) -> Result<BTreeSet<u64>> {
    rows.iter()
        .map(|row| row.parse().with_context(|| format!("a number: {row:?}")))
        .collect()
}

/// Sessions that commit one transaction after the other in the background.
#[derive(Debug)]
pub struct Committers {
    threads: Vec<JoinHandle<Result<()>>>,
    commits: Arc<Mutex<Vec<Commit>>>,
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
}

impl Committers {
    /// Starts `sessions` sessions, made by `open`; they commit until they are stopped.
    pub fn start(
        sessions: u64,
        rng: &mut Rng,
        open: impl Fn(u64) -> Result<Conversation> + Send + Sync + 'static,
    ) -> Committers {
        let stop = Arc::new(AtomicBool::new(false));
        let committed = Arc::new(AtomicU64::new(0));
        let commits = Arc::new(Mutex::new(Vec::new()));
        let open = Arc::new(open);
        let threads = (1..=sessions).map(|session| {
            let (stop, open, mut rng) = (Arc::clone(&stop), Arc::clone(&open), rng.fork());
            let (commits, committed) = (Arc::clone(&commits), Arc::clone(&committed));
            // The session is opened by the thread that uses it: its process ends with that thread.
            std::thread::spawn(move || {
                let mut conversation = open(session)?;
                let note = |commit| {
                    lock(&commits).push(commit);
                    committed.fetch_add(1, Ordering::SeqCst);
                };
                commit_numbers(&mut conversation, session, &mut rng, &stop, note)?;
                conversation.finish(Duration::from_secs(30))
            })
        });
        Committers {
            threads: threads.collect(),
            commits,
            stop,
            committed,
        }
    }

    /// Waits until `count` more transactions have been committed.
    pub fn wait_for(&self, count: u64) -> Result<()> {
        let goal = self.committed.load(Ordering::SeqCst) + count;
        poll_until(&format!("{count} more commits"), Duration::from_secs(300), || {
            let dead = self.threads.iter().any(JoinHandle::is_finished);
            ensure!(!dead, "a session ended early");
            Ok((self.committed.load(Ordering::SeqCst) >= goal).then_some(()))
        })
    }

    /// The transactions that have returned by now.
    pub fn so_far(&self) -> CommitLog {
        CommitLog {
            commits: lock(&self.commits).clone(),
        }
    }

    /// Ends the sessions after their present transaction; gives all transactions.
    pub fn stop(mut self) -> Result<CommitLog> {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow!("a session panicked"))??;
        }
        Ok(self.so_far())
    }
}

impl Drop for Committers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn commit_numbers(
    conversation: &mut Conversation,
    session: u64,
    rng: &mut Rng,
    stop: &AtomicBool,
    mut note: impl FnMut(Commit),
) -> Result<()> {
    let tally = format!("insert into tally values ({session}, 0);\nselect 'ready';\n");
    conversation.ask(&tally, "ready")?;
    for count in 1..SESSION_NUMBERS {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let number = session * SESSION_NUMBERS + count;
        let filler = format!("{:016x}", rng.next_u64()).repeat(rng.between(1, 60) as usize);
        let sql = format!(
            "begin; insert into entry values ({number}, '{filler}'); \
             update tally set entries = entries + 1 where session = {session}; commit;\nselect 'done {number}';\n"
        );
        let began = WallNs::now();
        conversation.ask(&sql, &format!("done {number}"))?;
        let returned = WallNs::now();
        note(Commit {
            number,
            began,
            returned,
        });
    }
    Ok(())
}

fn lock(commits: &Mutex<Vec<Commit>>) -> MutexGuard<'_, Vec<Commit>> {
    commits.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a session's stderr goes.
pub fn session_log(dir: &Path, session: u64) -> std::path::PathBuf {
    dir.join(format!("session-{session}.log"))
}

#[cfg(test)]
mod tests {
    use super::{Commit, CommitLog, numbers};
    use crate::moments::WallNs;

    /// Goal: the judge is right before it judges. Method: three commits around a moment, and databases
    /// with too few, too many, and strange ones.
    #[test]
    fn a_lost_and_an_early_commit_are_told_apart_from_one_under_way() {
        let commit = |number, began, returned| Commit {
            number,
            began: WallNs(began),
            returned: WallNs(returned),
        };
        let log = CommitLog {
            commits: vec![commit(1, 10, 20), commit(2, 25, 40), commit(3, 50, 60)],
        };
        let at = WallNs(30);
        let check = |rows: &[&str]| {
            let rows: Vec<String> = rows.iter().map(|&row| row.to_owned()).collect();
            log.check(at, &numbers(&rows).expect("numbers"))
                .map_err(|error| error.to_string())
        };
        assert_eq!(check(&["1"]), Ok(()));
        assert_eq!(check(&["1", "2"]), Ok(()));
        assert!(check(&["2"]).expect_err("1 had returned").contains("is lost"));
        assert!(
            check(&["1", "3"])
                .expect_err("3 had not begun")
                .contains("is there")
        );
        assert!(
            check(&["1", "9"])
                .expect_err("no such")
                .contains("nobody committed")
        );
    }
}
