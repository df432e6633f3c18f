//! The shop on SQLite, where PostgreSQL is not to be had: one session makes the payments.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use cdp_tests::Scene;
use cdp_tests::commits::{Committers, SCHEMA, session_log};
use cdp_tests::sqlite::{Database, Journal};

use super::Invoices;

const FILE: &str = "shop.db";
const MAKE_INVOICES: &str = "create table invoice (number bigint primary key, cents bigint not null, customer text);\
    insert into invoice with recursive n(n) as (select 1 union all select n + 1 from n where n < 50000) \
    select n, 100 + n * 7919 % 100000, 'customer ' || n from n;";
const SUM_INVOICES: &str = "select count(*), sum(cents) from invoice";
const COUNT_PAYMENTS: &str = "select count(*) from entry";

pub(super) struct Shop {
    database: Database,
    payments: Committers,
    folder: PathBuf,
}

impl Shop {
    /// A database in folder `dir` with invoices, and a session at work.
    pub(super) fn open(scene: &Scene, dir: &Path) -> Result<Shop> {
        let database = Database::new(&dir.join(FILE), Journal::Wal);
        let mut setup = database.session(&scene.log("sqlite"))?;
        setup.ask(&format!("{SCHEMA}\n{MAKE_INVOICES}\nselect 'made';\n"), "made")?;
        setup.finish(Duration::from_secs(10))?;
        let (sessions, folder) = (database.clone(), scene.dir().to_owned());
        let open = move |session| sessions.session(&session_log(&folder, session));
        let payments = Committers::start(1, &mut scene.rng(), open);
        Ok(Shop {
            database,
            payments,
            folder: scene.dir().to_owned(),
        })
    }
}

impl super::Shop for Shop {
    fn about(&self) -> &str {
        "SQLite, with one session that commits without a pause,"
    }

    fn invoices(&self) -> Result<Invoices> {
        Invoices::parse(&self.database.sql(SUM_INVOICES)?)
    }

    fn payments(&self) -> Result<u64> {
        count(&self.database)
    }

    fn drop_invoices(&self) -> Result<()> {
        self.database.sql("drop table invoice").map(drop)
    }

    fn open_restored(&self, dir: &Path) -> Result<(Invoices, u64, Duration)> {
        let started = Instant::now();
        let copy = Database::new(&dir.join(FILE), Journal::Wal);
        copy.check_integrity()
            .with_context(|| format!("in {}", self.folder.display()))?;
        let ready = started.elapsed();
        Ok((Invoices::parse(&copy.sql(SUM_INVOICES)?)?, count(&copy)?, ready))
    }

    fn close(self: Box<Self>) -> Result<()> {
        self.payments.stop().map(drop)
    }
}

fn count(database: &Database) -> Result<u64> {
    let rows = database.sql(COUNT_PAYMENTS)?;
    rows.first()
        .context("a row")?
        .parse()
        .context("a number of payments")
}
