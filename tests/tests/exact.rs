//! P1, exact: at every quiet moment a restored image has the SHA-256 that the device had, while later
//! writes go on.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use cdp_tests::agent::{Agent, AgentPlan};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB, Zram, zero_out};
use cdp_tests::fingerprint::Fingerprint;
use cdp_tests::fio::Fio;
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::process::poll_until;
use cdp_tests::restore::Restore;
use cdp_tests::rng::Rng;
use cdp_tests::scene::skip_part;
use cdp_tests::trace::BioTrace;
use cdp_tests::workload::Mix;
use cdp_tests::{Scene, system_test};

/// Quiet moments of each repetition.
const MOMENTS: usize = 4;
/// Exactness is judged where nothing was dropped, so the ring holds the burst that a freeze writes.
const RING_BYTES: &str = "268435456";
/// How fast each writer of a mix writes.
const WRITER_BYTES_PER_SECOND: u64 = 40 * MIB;

/// Goal: P1 on ext4. Method: writers do everything to files; freeze, hash, thaw, again and again; the
/// image of each moment has the same SHA-256.
#[test]
fn ext4_is_exact_at_every_quiet_moment() {
    file_system_is_exact(FileSystem::Ext4);
}

/// Goal: P1 on XFS. Method: as on ext4.
#[test]
fn xfs_is_exact_at_every_quiet_moment() {
    file_system_is_exact(FileSystem::Xfs);
}

/// Goal: P1 on btrfs. Method: as on ext4.
#[test]
fn btrfs_is_exact_at_every_quiet_moment() {
    file_system_is_exact(FileSystem::Btrfs);
}

fn file_system_is_exact(file_system: FileSystem) {
    let programs: Vec<&str> = file_system
        .programs()
        .iter()
        .copied()
        .chain(["fio", "fstrim"])
        .collect();
    system_test(&format!("exact: {}", file_system.name()), &programs, |scene| {
        let mut rng = scene.rng();
        let options = LoopOptions::of_bytes(file_system.bytes_min());
        let options = if rng.one_in(2) { options.direct() } else { options };
        let options = if rng.one_in(3) {
            options.sectors(4096)
        } else {
            options
        };
        let device = LoopDevice::create(&scene.path("disk"), options)?;
        let plan = plan(scene)?.volume("v", device.path());
        // The first copy is taken under writes one time, of a blank device that is formatted later another.
        let (agent, mount, writers) = if rng.one_in(2) {
            file_system.make(device.path())?;
            let mount = Mount::new(device.path(), file_system, &scene.path("mnt"))?;
            let writers = Mix::on_files(mount.dir(), &mut rng, 2, WRITER_BYTES_PER_SECOND)?;
            writers.wait_for_bytes(4 * MIB)?;
            (plan.protect()?, mount, writers)
        } else {
            let agent = plan.protect()?;
            file_system.make(device.path())?;
            let mount = Mount::new(device.path(), file_system, &scene.path("mnt"))?;
            let writers = Mix::on_files(mount.dir(), &mut rng, 2, WRITER_BYTES_PER_SECOND)?;
            (agent, mount, writers)
        };
        let mapped = mapped_writer(scene, &mount)?;
        let mut moments = Vec::new();
        for _ in 0..MOMENTS {
            let bytes = rng.between(2 * MIB, 12 * MIB);
            writers.wait_for_bytes(bytes)?;
            if rng.one_in(2) {
                mount.trim()?;
            }
            moments.push(QuietMoment::of_mount("v", device.path(), &mount)?);
        }
        mapped.stop()?;
        writers.stop()?;
        moments.push(QuietMoment::of_mount("v", device.path(), &mount)?);
        mount.unmount()?;
        moments.push(QuietMoment::of_raw("v", device.path())?);
        check_all(scene, &mut rng, agent, plan.store(), moments)
    });
}

/// Stores through a shared mapping, which no system call announces.
fn mapped_writer(scene: &Scene, mount: &Mount) -> Result<cdp_tests::fio::FioRun> {
    Fio::new("mapped", &mount.dir().join("mapped"), "randwrite")
        .option("ioengine", "mmap")
        .option("bs", "4k")
        .option("size", "8m")
        .option("rate", "8m")
        .option("fsync", 64)
        .option("time_based", 1)
        .option("runtime", 600)
        .seed(scene.seed())
        .start(scene.dir())
}

/// Goal: P1 on a raw device with 512-byte sectors under fio and under writes of single sectors, zeroing and
/// discards. Method: random jobs; between them nobody writes: flush, hash; compare with the images.
#[test]
fn a_raw_device_of_512_byte_sectors_is_exact() {
    raw_device_is_exact("exact: raw, 512", 512);
}

/// Goal: the same with 4096-byte sectors. Method: the same.
#[test]
fn a_raw_device_of_4096_byte_sectors_is_exact() {
    raw_device_is_exact("exact: raw, 4096", 4096);
}

fn raw_device_is_exact(name: &str, sector_bytes: u32) {
    system_test(name, &["fio", "blkdiscard"], |scene| {
        // An odd size: the last block and the last 64 KiB unit are not whole.
        let bytes = 64 * MIB + 5 * u64::from(sector_bytes);
        let options = LoopOptions::of_bytes(bytes).sectors(sector_bytes);
        let device = LoopDevice::create(&scene.path("disk"), options)?;
        raw_is_exact(scene, device.path(), sector_bytes)
    });
}

/// Goal: P1 on a driver that takes bios and makes no requests of them. Method: as on a raw device, on zram.
#[test]
fn a_bio_based_device_is_exact() {
    let name = "exact: zram";
    system_test(name, &["fio", "blkdiscard"], |scene| {
        let Some(device) = Zram::create(64 * MIB)? else {
            skip_part(name, "no unused zram device");
            return Ok(());
        };
        raw_is_exact(scene, device.path(), 4096)
    });
}

fn raw_is_exact(scene: &Scene, device: &Path, sector_bytes: u32) -> Result<()> {
    let mut rng = scene.rng();
    let plan = plan(scene)?.volume("v", device);
    // Old content that the first copy must fetch.
    raw_job(scene, &mut rng, device, sector_bytes)?;
    let writers = Mix::on_device(device, &mut rng, 2, WRITER_BYTES_PER_SECOND)?;
    writers.wait_for_bytes(4 * MIB)?;
    let agent = plan.protect()?;
    writers.stop()?;
    let mut moments = vec![QuietMoment::of_raw("v", device)?];
    for _ in 0..MOMENTS {
        if rng.one_in(2) {
            raw_job(scene, &mut rng, device, sector_bytes)?;
        }
        let writers = Mix::on_device(device, &mut rng, 2, WRITER_BYTES_PER_SECOND)?;
        let bytes = rng.between(MIB, 12 * MIB);
        writers.wait_for_bytes(bytes)?;
        writers.stop()?;
        moments.push(QuietMoment::of_raw("v", device)?);
    }
    check_all(scene, &mut rng, agent, plan.store(), moments)
}

/// A random job of fio: sizes from one sector to 1 MiB, any depth, from the page cache or direct.
fn raw_job(scene: &Scene, rng: &mut Rng, device: &Path, sector_bytes: u32) -> Result<()> {
    let sizes: Vec<String> = [u64::from(sector_bytes), 4096, 20480, 65536, MIB]
        .map(|size| size.to_string())
        .into();
    let rw = *rng.pick(&["write", "randwrite", "randtrimwrite"]);
    let fio = Fio::new("job", device, rw)
        .option("size", "100%")
        .option("io_size", "12m")
        .seed(rng.next_u64());
    let fio = if rw == "randtrimwrite" {
        fio.option("bs", "64k")
    } else {
        fio.option("bs", rng.pick(&sizes))
    };
    let fio = match rng.below(3) {
        0 => fio.option("fsync", 32),
        1 => fio.direct(1),
        _ => fio.direct(16),
    };
    fio.run(scene.dir()).map(drop)
}

/// Goal: bios above 16 MiB are captured whole. Method: xfs and btrfs with large folios under large writes,
/// buffered and direct; the trace must show such bios, or the test proves nothing.
#[test]
fn bios_above_16_mib_are_exact() {
    for file_system in [FileSystem::Xfs, FileSystem::Btrfs] {
        let programs: Vec<&str> = file_system.programs().iter().copied().chain(["fio"]).collect();
        system_test(
            &format!("exact: large bios on {}", file_system.name()),
            &programs,
            |scene| {
                let mut rng = scene.rng();
                let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(384 * MIB))?;
                file_system.make(device.path())?;
                let mount = Mount::new(device.path(), file_system, &scene.path("mnt"))?;
                let plan = AgentPlan::new(scene, &scene.path("store"))?;
                let plan = plan.flag("--ring-bytes", "536870912").volume("v", device.path());
                let agent = plan.protect()?;
                let trace = BioTrace::start(device.path(), 16 * MIB, &scene.path("tracefs"))?;
                let mut moments = Vec::new();
                for (name, direct) in [("buffered", 0), ("direct", 1), ("again", 0)] {
                    let file = mount.dir().join(if name == "again" { "buffered" } else { name });
                    Fio::new(name, &file, "write")
                        .option("bs", "64m")
                        .option("size", "96m")
                        .option("direct", direct)
                        .option("iomem", "mmap")
                        .option("end_fsync", 1)
                        .seed(rng.next_u64())
                        .run(scene.dir())?;
                    moments.push(QuietMoment::of_mount("v", device.path(), &mount)?);
                }
                match trace {
                    // How large btrfs makes them depends on how memory is scattered; xfs always makes some.
                    Some(trace) if file_system == FileSystem::Xfs => ensure!(
                        !trace.sizes()?.is_empty(),
                        "no bio above 16 MiB: nothing was proved"
                    ),
                    Some(trace) if trace.sizes()?.is_empty() => {
                        skip_part(
                            "exact: large bios on btrfs",
                            "it made none above 16 MiB this time",
                        );
                    }
                    Some(_) => {}
                    None => skip_part("exact: large bios", "no tracefs to see that there were any"),
                }
                mount.unmount()?;
                moments.push(QuietMoment::of_raw("v", device.path())?);
                check_all(scene, &mut rng, agent, plan.store(), moments)
            },
        );
    }
}

/// Goal: what the disk takes is what a view shows, also where a page is changed after its write was seen and
/// its block is given up before it is written again; ext4 keeps no page stable here. Method: the file system
/// under the loop device is frozen, so that writes stay on their way until their pages were changed; then the
/// file is truncated. Hash at quiet moments. Blocks must have been corrected, or the test proves nothing.
#[test]
fn what_changes_while_it_is_written_is_exact() {
    const FILE_BYTES: usize = 256 << 10;
    let programs = ["mkfs.ext4", "fsfreeze"];
    system_test("exact: changed in flight", &programs, |scene| {
        let mut rng = scene.rng();
        let under = LoopDevice::create(&scene.path("under"), LoopOptions::of_bytes(384 * MIB))?;
        FileSystem::Ext4.make(under.path())?;
        let under = Mount::new(under.path(), FileSystem::Ext4, &scene.path("under-mnt"))?;
        let device = LoopDevice::create(&under.dir().join("disk"), LoopOptions::of_bytes(192 * MIB))?;
        zero_out(device.path(), 0, 192 * MIB)?;
        FileSystem::Ext4.make(device.path())?;
        let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
        let plan = plan(scene)?.volume("v", device.path());
        let mut agent = plan.protect()?;
        let mut moments = Vec::new();
        for round in 0..4 {
            let file = File::create(mount.dir().join(format!("changing-{round}")))?;
            let mut bytes = vec![round; FILE_BYTES];
            file.write_all_at(&bytes, 0)?;
            mount.sync()?;
            agent.wait_synced()?;
            let captured = agent.volume("v")?.captured_bytes;
            let frozen = under.freeze()?;
            bytes.fill(0x10 | round);
            file.write_all_at(&bytes, 0)?;
            std::thread::scope(|scope| {
                let written = scope.spawn(|| file.sync_data());
                poll_until("the writes to be seen", Duration::from_secs(30), || {
                    let now = agent.volume("v")?.captured_bytes;
                    Ok((now >= captured + FILE_BYTES as u64).then_some(()))
                })?;
                let changed = rng.below(FILE_BYTES as u64 / 4096);
                file.write_all_at(&[0x20 | round; 4096], changed * 4096)?;
                drop(frozen);
                // Waits for the writes under way, and drops what was changed since.
                file.set_len(0)?;
                written.join().map_err(|_| anyhow!("the sync panicked"))??;
                Result::<()>::Ok(())
            })?;
            moments.push(QuietMoment::of_mount("v", device.path(), &mount)?);
        }
        mount.unmount()?;
        moments.push(QuietMoment::of_raw("v", device.path())?);
        check_changed(scene, &mut rng, agent, plan.store(), moments)?;
        drop(device);
        under.unmount()
    });
}

/// Goal: where two writes to one place are on their way at once, a view shows the one that the disk kept.
/// Method: direct writers at depth fight for a few blocks of a raw device; hash whenever they have ended. Which
/// write wins is up to the disk: rounds go on until it has taken two in the other order, if it ever does.
#[test]
fn writes_that_overtake_each_other_end_as_on_the_disk() {
    const ROUNDS: u64 = 6;
    const ROUNDS_MAX: u64 = 60;
    system_test("exact: overlapping writes", &["fio"], |scene| {
        let mut rng = scene.rng();
        let options = LoopOptions::of_bytes(16 * MIB).direct();
        let device = LoopDevice::create(&scene.path("disk"), options)?;
        cdp_tests::device::set_queue_depth(device.path(), 4)?;
        let plan = plan(scene)?.volume("v", device.path());
        let mut agent = plan.protect()?;
        let mut moments = Vec::new();
        let mut corrected = 0;
        for round in 0..ROUNDS_MAX {
            Fio::new(&format!("fight-{round}"), device.path(), "randwrite")
                .option("bsrange", if round % 2 == 0 { "4k-4k" } else { "512-16k" })
                .option("blocksize_unaligned", 0)
                .option("size", "128k")
                .option("io_size", if round < ROUNDS { "8m" } else { "1m" })
                .option("numjobs", 4)
                .option("norandommap", 1)
                .direct(16)
                .seed(rng.next_u64())
                .run(scene.dir())?;
            moments.push(QuietMoment::of_raw("v", device.path())?);
            agent.wait_synced()?;
            corrected = agent.volume("v")?.corrected_blocks;
            if corrected > 0 && round + 1 >= ROUNDS {
                break;
            }
        }
        if corrected == 0 {
            skip_part(
                "exact: overlapping writes",
                "this disk took all of them in the order of their issue",
            );
        }
        check_all(scene, &mut rng, agent, plan.store(), moments)
    });
}

/// As [`check_all`], and blocks must have been found to differ from what was seen.
fn check_changed(
    scene: &Scene,
    rng: &mut Rng,
    mut agent: cdp_tests::agent::Agent,
    store: &Path,
    moments: Vec<QuietMoment>,
) -> Result<()> {
    agent.wait_synced()?;
    let corrected = agent.volume("v")?.corrected_blocks;
    ensure!(corrected > 0, "no block was corrected: nothing was proved");
    check_all(scene, rng, agent, store, moments)
}

/// Goal: a partition is a volume like any other, though its bios may carry sectors of the disk. Method:
/// protect the second of two partitions, write to both; and write to the second through its disk.
#[test]
fn a_partition_is_exact_and_sees_writes_through_its_disk() {
    system_test("exact: a partition", &["sfdisk", "fio", "blkdiscard"], |scene| {
        let mut rng = scene.rng();
        let device = LoopDevice::create(
            &scene.path("disk"),
            LoopOptions::of_bytes(100 * MIB).partitioned(),
        )?;
        let parts = device.partition(&[32, 48])?;
        let plan = plan(scene)?.volume("part", &parts[1]);
        let agent = plan.protect()?;
        let mut moments = Vec::new();
        for _ in 0..MOMENTS {
            let neighbour = Mix::on_device(&parts[0], &mut rng, 1, WRITER_BYTES_PER_SECOND)?;
            let writers = Mix::on_device(&parts[1], &mut rng, 2, WRITER_BYTES_PER_SECOND)?;
            writers.wait_for_bytes(6 * MIB)?;
            writers.stop()?;
            neighbour.stop()?;
            moments.push(QuietMoment::of_raw("part", &parts[1])?);
        }
        // The second partition begins 1 + 32 MiB into the disk.
        let through = Fio::new("through", device.path(), "randwrite")
            .option("offset", "34m")
            .option("size", "8m");
        through
            .option("bs", "4k")
            .direct(4)
            .seed(rng.next_u64())
            .run(scene.dir())?;
        moments.push(QuietMoment::of_raw("part", &parts[1])?);
        ensure!(
            moments[MOMENTS].content != moments[MOMENTS - 1].content,
            "the disk's writes missed the partition"
        );
        check_all(scene, &mut rng, agent, plan.store(), moments)
    });
}

/// Goal: a whole disk is exact though it is written through its partitions. Method: a file system on one
/// partition, raw writes to the other, and the table itself rewritten.
#[test]
fn a_disk_written_through_its_partitions_is_exact() {
    system_test(
        "exact: a disk by its partitions",
        &["sfdisk", "blkdiscard", "mkfs.ext4"],
        |scene| {
            let mut rng = scene.rng();
            let device = LoopDevice::create(
                &scene.path("disk"),
                LoopOptions::of_bytes(100 * MIB).partitioned(),
            )?;
            let plan = plan(scene)?.volume("disk", device.path());
            let agent = plan.protect()?;
            let parts = device.partition(&[48, 0])?;
            FileSystem::Ext4.make(&parts[0])?;
            let mount = Mount::new(&parts[0], FileSystem::Ext4, &scene.path("mnt"))?;
            let files = Mix::on_files(mount.dir(), &mut rng, 1, WRITER_BYTES_PER_SECOND)?;
            let mut moments = Vec::new();
            for _ in 0..MOMENTS {
                let raw = Mix::on_device(&parts[1], &mut rng, 2, WRITER_BYTES_PER_SECOND)?;
                raw.wait_for_bytes(4 * MIB)?;
                raw.stop()?;
                files.wait_for_bytes(MIB)?;
                cdp_tests::device::flush_cache(&parts[1])?;
                let frozen = mount.freeze()?;
                moments.push(QuietMoment::of_quiet_device("disk", device.path())?);
                drop(frozen);
            }
            files.stop()?;
            mount.unmount()?;
            moments.push(QuietMoment::of_raw("disk", device.path())?);
            check_all(scene, &mut rng, agent, plan.store(), moments)
        },
    );
}

/// Goal: the volumes of one agent share one order, so one time names one moment of all of them. Method:
/// three devices written at once; freeze them together; restore each at the very same time.
#[test]
fn several_volumes_are_exact_at_one_common_moment() {
    system_test(
        "exact: several volumes",
        &["mkfs.ext4", "mkfs.btrfs", "blkdiscard"],
        |scene| {
            let mut rng = scene.rng();
            let create =
                |name: &str, bytes| LoopDevice::create(&scene.path(name), LoopOptions::of_bytes(bytes));
            let devices = [
                create("a", 64 * MIB)?,
                create("b", 128 * MIB)?,
                create("c", 32 * MIB)?,
            ];
            let names = ["a", "b", "c"];
            let mut plan = plan(scene)?;
            for (name, device) in names.iter().zip(&devices) {
                plan = plan.volume(name, device.path());
            }
            let agent = plan.protect()?;
            let mut mounts = Vec::new();
            for (at, file_system) in [FileSystem::Ext4, FileSystem::Btrfs].into_iter().enumerate() {
                file_system.make(devices[at].path())?;
                mounts.push(Mount::new(
                    devices[at].path(),
                    file_system,
                    &scene.path(&format!("mnt-{at}")),
                )?);
            }
            let files = [
                Mix::on_files(mounts[0].dir(), &mut rng, 1, WRITER_BYTES_PER_SECOND)?,
                Mix::on_files(mounts[1].dir(), &mut rng, 1, WRITER_BYTES_PER_SECOND)?,
            ];
            let mut common = Vec::new();
            for _ in 0..MOMENTS / 2 {
                let raw = Mix::on_device(devices[2].path(), &mut rng, 1, WRITER_BYTES_PER_SECOND)?;
                files[0].wait_for_bytes(4 * MIB)?;
                files[1].wait_for_bytes(MIB)?;
                raw.stop()?;
                cdp_tests::device::flush_cache(devices[2].path())?;
                let frozen = mounts.iter().map(Mount::freeze).collect::<Result<Vec<_>>>()?;
                let from = WallNs::now();
                let quiet = |at: usize| QuietMoment::of_quiet_device(names[at], devices[at].path());
                let group = (0..names.len()).map(quiet).collect::<Result<Vec<_>>>()?;
                common.push((WallNs::random_between(&mut rng, from, WallNs::now()), group));
                drop(frozen);
            }
            for writers in files {
                writers.stop()?;
            }
            mounts.into_iter().try_for_each(Mount::unmount)?;
            agent.expect_nothing_dropped()?;
            let restore = Restore::from(plan.store())?;
            for (at, group) in &common {
                for moment in group {
                    moment.check_at(&restore, &at.to_string(), &scene.path("image"))?;
                }
            }
            agent.stop()
        },
    );
}

fn plan(scene: &Scene) -> Result<AgentPlan> {
    Ok(AgentPlan::new(scene, &scene.path("store"))?.flag("--ring-bytes", RING_BYTES))
}

/// Checks `moments` in random order, half of them beside the living agent, then `latest`, then the rest
/// after its end; the last moment must be what the device still holds.
fn check_all(
    scene: &Scene,
    rng: &mut Rng,
    mut agent: Agent,
    store: &Path,
    mut moments: Vec<QuietMoment>,
) -> Result<()> {
    agent.wait_and_check()?;
    for volume in agent.status()?.volumes {
        let (compared, corrected) = (volume.compared_blocks, volume.corrected_blocks);
        println!(
            "{}: {compared} blocks were compared, {corrected} corrected",
            volume.name
        );
    }
    let restore = Restore::from(store)?;
    let image: PathBuf = scene.path("image");
    let last = moments.last().context("a moment")?.clone();
    shuffle(rng, &mut moments);
    let (living, dead) = moments.split_at(moments.len() / 2);
    for moment in living {
        moment.check(&restore, rng, &image)?;
    }
    last.check_at(&restore, "latest", &image)?;
    agent.check_alive()?;
    agent.stop()?;
    for moment in dead {
        moment.check(&restore, rng, &image)?;
    }
    last.check_at(&restore, "latest", &image)?;
    restore
        .command("verify")
        .timeout(Duration::from_secs(300))
        .run()?
        .success()
        .map(drop)
}

fn shuffle<T>(rng: &mut Rng, items: &mut [T]) {
    for at in (1..items.len()).rev() {
        items.swap(at, rng.below(at as u64 + 1) as usize);
    }
}

/// Goal: what the tests above compare is the device and not its cache. Method: the two ways of reading a
/// quiet device agree.
#[test]
fn a_quiet_device_reads_alike_both_ways() {
    system_test("exact: two ways of reading", &["fio"], |scene| {
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(16 * MIB))?;
        raw_job(scene, &mut scene.rng(), device.path(), 512)?;
        let direct = Fingerprint::of_device(device.path())?;
        direct.expect_same(&Fingerprint::of_file(device.path())?, "by the page cache")
    });
}
