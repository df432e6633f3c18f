//! A store with so many writes of history, and what its volume held in the middle and at the end, to compare with.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use cdp_tests::Scene;
use cdp_tests::agent::{Agent, AgentPlan};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB, flush_cache};
use cdp_tests::fio::Fio;
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::process::cmd;
use cdp_tests::restore::Restore;
use cdp_tests::view::View;

/// The volume.
pub(super) const VOLUME_BYTES: u64 = 4096 * MIB;
pub(super) const BLOCK_BYTES: u64 = 4096;
/// The file in it that the writes go to.
pub(super) const FILE: &str = "file";
/// How long a server may take to have all of it.
const SYNC_TIMEOUT: Duration = Duration::from_secs(600);
const COMPARE_TIMEOUT: Duration = Duration::from_secs(300);

/// A store, and the device whose history it is.
///
/// Half of the writes fill a file in random order, each block once; the other half writes all of it once more, in
/// another order. Between the two the file system was still, and a bookmark was set.
pub(super) struct History {
    // In the order in which they are let go.
    agent: Option<Agent>,
    device: LoopDevice,
    pub(super) writes: u64,
    pub(super) store: PathBuf,
    pub(super) restore: Restore,
    /// What the volume held then.
    middle: PathBuf,
}

/// A moment of a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Latest,
    Middle,
}

impl Moment {
    pub(super) const ALL: [Moment; 2] = [Moment::Latest, Moment::Middle];

    /// As a WHEN.
    pub(super) fn when(self) -> &'static str {
        match self {
            Moment::Latest => "latest",
            Moment::Middle => "bookmark:middle",
        }
    }
}

impl History {
    /// An ext4 with so many writes of 4 KiB of noise; `more` adds to how the agent is started.
    pub(super) fn make(
        scene: &Scene,
        name: &str,
        writes: u64,
        more: impl FnOnce(AgentPlan) -> AgentPlan,
    ) -> Result<History> {
        let path = scene.path(&format!("disk-{name}"));
        let device = LoopDevice::create(&path, LoopOptions::of_bytes(VOLUME_BYTES))?;
        FileSystem::Ext4.make(device.path())?;
        let store = scene.path(&format!("store-{name}"));
        let plan = AgentPlan::new(scene, &store)?
            .log(scene.log(&format!("agent-{name}")))
            .volume("v", device.path());
        let mut agent = more(plan).protect()?;
        let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
        let file = mount.dir().join(FILE);
        fs::File::create(&file)?.set_len(Self::file_bytes(writes))?;
        let write_all = |seed| {
            let job = Fio::new("writes", &file, "randwrite").option("bs", BLOCK_BYTES);
            job.direct(16).seed(seed).run(scene.dir())
        };
        write_all(7)?;
        let frozen = mount.freeze()?;
        agent.bookmark("middle")?;
        flush_cache(device.path())?;
        let middle = scene.path(&format!("middle-{name}"));
        let keep = cmd("cp").arg("--sparse=auto").args([device.backing(), &middle]);
        keep.timeout(COMPARE_TIMEOUT).run()?.success()?;
        drop(frozen);
        write_all(8)?;
        mount.unmount()?;
        flush_cache(device.path())?;
        agent.wait_synced_within(SYNC_TIMEOUT)?;
        let captured = agent.volume("v")?.captured_writes;
        ensure!(captured >= writes, "{captured} of {writes} writes were captured");
        Ok(History {
            agent: Some(agent),
            device,
            writes,
            restore: Restore::from(&store)?,
            store,
            middle,
        })
    }

    /// The size of the file that so many writes go to.
    pub(super) fn file_bytes(writes: u64) -> u64 {
        writes / 2 * BLOCK_BYTES
    }

    /// An error if `image` is not what the volume held at `moment`.
    pub(super) fn expect_same(&self, moment: Moment, image: &Path) -> Result<()> {
        let held = match moment {
            Moment::Latest => self.device.backing(),
            Moment::Middle => &self.middle,
        };
        let compare = cmd("cmp").args([image, held]).timeout(COMPARE_TIMEOUT);
        let same = compare.run()?.success();
        same.map(drop)
            .with_context(|| format!("the image of {} is not the device", moment.when()))
    }

    /// Stops its agent.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.agent.take().map_or(Ok(()), Agent::stop)
    }

    /// Stops its agent and removes everything.
    pub(super) fn remove(mut self) -> Result<()> {
        self.stop()?;
        drop(self.device);
        fs::remove_file(&self.middle).context("remove what a volume held")?;
        fs::remove_dir_all(&self.store).context("remove a store")
    }
}

/// Mounts the newest moment and lists its first file: how long that takes.
pub(super) fn time_mount(view: &View) -> Result<Duration> {
    let started = Instant::now();
    view.mount("latest", &[])?.success()?;
    let first = fs::read_dir(view.dir())?.next().context("nothing is listed")??;
    let time = started.elapsed();
    drop(first);
    view.try_unmount()?.success()?;
    Ok(time)
}
