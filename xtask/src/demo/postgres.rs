//! The shop on PostgreSQL: pgbench makes the payments.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use cdp_tests::Scene;
use cdp_tests::postgres::{Installation, Server};
use cdp_tests::process::Background;

use super::Invoices;

/// 100 000 accounts each: some 75 MiB.
const PGBENCH_SCALE: &str = "5";
const MAKE_INVOICES: &str = "create table invoice (number bigint primary key, cents bigint not null, customer text);\
    insert into invoice select n, 100 + n * 7919 % 100000, 'customer ' || md5(n::text) from generate_series(1, 50000) n;\
    checkpoint";
const SUM_INVOICES: &str = "select count(*), sum(cents) from invoice";
const COUNT_PAYMENTS: &str = "select count(*) from pgbench_history";

pub(super) struct Shop {
    about: String,
    postgres: Installation,
    // Before the server: payments end first.
    payments: Background,
    server: Server,
    folder: PathBuf,
}

impl Shop {
    /// A cluster in folder `dir` with invoices, pgbench's tables, and pgbench at work.
    pub(super) fn open(scene: &Scene, dir: &Path, postgres: Installation) -> Result<Shop> {
        let data = dir.join("data");
        postgres.create_cluster(&data)?;
        let settings = ["max_wal_size=64MB", "min_wal_size=16MB"];
        let server = postgres.start(&data, &scene.path("sockets"), &settings, &scene.log("postgres"))?;
        let fill = server
            .client("pgbench")
            .args(["--initialize", "--quiet", "--scale", PGBENCH_SCALE]);
        fill.run()?.success().context("fill the tables of pgbench")?;
        server.sql(MAKE_INVOICES)?;
        let work = ["--client=4", "--jobs=2", "--time=3600", "--no-vacuum"];
        let payments = server.client("pgbench").args(work).spawn(&scene.log("pgbench"))?;
        let about = format!("{} under pgbench", postgres.version()?);
        Ok(Shop {
            about,
            postgres,
            payments,
            server,
            folder: scene.dir().to_owned(),
        })
    }
}

impl super::Shop for Shop {
    fn about(&self) -> &str {
        &self.about
    }

    fn invoices(&self) -> Result<Invoices> {
        Invoices::parse(&self.server.sql(SUM_INVOICES)?)
    }

    fn payments(&self) -> Result<u64> {
        count(&self.server)
    }

    fn drop_invoices(&self) -> Result<()> {
        self.server.sql("drop table invoice").map(drop)
    }

    fn open_restored(&self, dir: &Path) -> Result<(Invoices, u64, Duration)> {
        let started = Instant::now();
        let log = self.folder.join("restored.log");
        let copy = self
            .postgres
            .start(&dir.join("data"), &self.folder.join("sockets-2"), &[], &log)?;
        let ready = started.elapsed();
        let found = Invoices::parse(&copy.sql(SUM_INVOICES)?)?;
        let payments = count(&copy)?;
        copy.stop()?;
        Ok((found, payments, ready))
    }

    fn close(self: Box<Self>) -> Result<()> {
        drop(self.payments);
        self.server.stop()
    }
}

fn count(server: &Server) -> Result<u64> {
    let rows = server.sql(COUNT_PAYMENTS)?;
    rows.first()
        .context("a row")?
        .parse()
        .context("a number of payments")
}
