//! `bisect`: the write that broke something, among thousands.

use std::fs;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::AgentPlan;
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::restore::Restore;
use cdp_tests::system_test;

const ROUNDS: usize = 1000;

/// Goal: a planted corruption of an SQLite database is found at the very write that planted it, in at most 20 runs of
/// the check. Method: transactions, each durable, with one page overwritten in the middle of them, straight on the
/// device; what `bisect` names must be that write.
#[test]
fn a_planted_corruption_is_found_at_its_write() {
    system_test("bisect: sqlite", &["mkfs.ext4", "sqlite3"], |scene| {
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(64 * MIB))?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        FileSystem::Ext4.make(device.path())?;
        let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
        let database = mount.dir().join("db");
        let sqlite = |script: String| {
            cdp_tests::process::cmd("sqlite3")
                .arg(&database)
                .stdin(script)
                .run()?
                .success()
        };
        let inserts = || "insert into t values(hex(randomblob(200)));\n".repeat(ROUNDS);
        sqlite(format!("create table t(x);\n{}", inserts()))?;
        agent.wait_synced()?;
        agent.bookmark("good")?;
        let planted_at = scene.rng().between(1, 8);
        for round in 0..10 {
            sqlite(inserts().lines().take(ROUNDS / 10).collect::<Vec<_>>().join("\n"))?;
            if round == planted_at {
                plant(&database)?;
            }
            agent.wait_synced()?;
        }
        mount.unmount()?;
        agent.wait_and_check()?;
        let restore = Restore::from(plan.store())?;
        let check = r#"test "$(sqlite3 "$CDP_MOUNT/db" 'pragma integrity_check' 2>&1)" = ok"#;
        let ran = restore
            .command("bisect")
            .args([
                "v",
                "--good",
                "bookmark:good",
                "--bad",
                "latest",
                "--json",
                "--",
                "sh",
                "-c",
                check,
            ])
            .run()?
            .success()?;
        let told: serde_json::Value = serde_json::from_str(&ran.stdout)?;
        let runs = told["runs"].as_u64().context("no number of runs")?;
        ensure!(runs <= 20, "{runs} runs: {}", ran.transcript());
        // Found again by its bytes.
        let found = restore
            .command("find")
            .args(["v", "--bytes", MARK, "--json", "--since", "bookmark:good"])
            .run()?;
        let found: serde_json::Value = serde_json::from_str(&found.success()?.stdout)?;
        ensure!(
            found["hits"][0]["seq"] == told["bad"]["seq"],
            "bisect: {told:#}\nfind: {found:#}"
        );
        ensure!(
            fs::read_dir("/run/cdp-restore").map_or(0, Iterator::count) == 0,
            "a mount is left"
        );
        agent.stop()
    });
}

/// Goal: nobody is blamed for what was written unseen; nor are bytes that only a gap held taken for never written. Method:
/// a file is made while no agent and no probe watches; `bisect` for it names the gap and no write, `find` tells of it.
#[test]
fn what_came_in_a_gap_is_no_writes_fault() {
    system_test("bisect: gap", &["mkfs.ext4"], |scene| {
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(32 * MIB))?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let agent = plan.protect()?;
        FileSystem::Ext4.make(device.path())?;
        let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
        mount.sync()?;
        agent.bookmark("good")?;
        agent.stop()?;
        plan.unload()?;
        fs::write(mount.dir().join("unseen"), "written in the gap")?;
        mount.sync()?;
        let mut agent = plan.protect()?;
        fs::write(mount.dir().join("later"), "an innocent write")?;
        mount.unmount()?;
        agent.wait_and_check()?;
        let restore = Restore::from(plan.store())?;
        let ran = restore
            .command("bisect")
            .args(["v", "--good", "bookmark:good", "--bad", "latest", "--json", "--"])
            .args(["sh", "-c", "test ! -e \"$CDP_MOUNT/unseen\""])
            .run()?
            .success()?;
        let told: serde_json::Value = serde_json::from_str(&ran.stdout)?;
        ensure!(
            told["write"].is_null() && told["gaps"][0]["cause"] == "agent-down",
            "{told:#}"
        );
        let found = restore
            .command("find")
            .args(["v", "--bytes", "-----BEGIN", "--json"]);
        let found = found.run()?.success()?;
        let found = found.expect_message(&["gap agent-down"])?;
        let told: serde_json::Value = serde_json::from_str(&found.stdout)?;
        ensure!(told["gaps"][0]["cause"] == "agent-down", "{told:#}");
        agent.stop()
    });
}

const MARK: &str = "this page was overwritten by a stranger";

/// Overwrites a page of the database that is full and that nobody looks at when rows are added.
fn plant(database: &std::path::Path) -> Result<()> {
    let file = fs::File::options().write(true).open(database)?;
    std::os::unix::fs::FileExt::write_all_at(&file, MARK.repeat(50).as_bytes(), 40 * 4096)?;
    Ok(file.sync_all()?)
}
