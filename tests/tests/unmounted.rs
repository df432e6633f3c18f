//! `cdp-restore files` where nobody may mount: what it reads of an ext4 is what the kernel reads of the same moment.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::AgentPlan;
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::moments::WallNs;
use cdp_tests::mount::Mount;
use cdp_tests::process::cmd;
use cdp_tests::restore::Restore;
use cdp_tests::rng::Rng;
use cdp_tests::view::files_in;
use cdp_tests::workload::Mix;
use cdp_tests::{Scene, system_test};

const DEVICE_BYTES: u64 = 64 * MIB;
const WRITER_BYTES_PER_SECOND: u64 = 4 * MIB;
/// Folders that lie there at a time.
const FOLDERS: u64 = 3;

/// Goal: who may not mount gets what a mount of the same moment shows, though most of it lies in the journal alone: with
/// its ends around the journal's, blocks that were revoked, files that were reserved, deleted, truncated. Method: writers
/// and folders that come and go on a small journal; random moments in the midst of it, copied both ways.
#[test]
fn an_ext4_is_read_as_the_kernel_reads_it() {
    same_both_ways("unmounted: ext4", &[], "defaults");
}

/// Goal: the same where files lie in their inodes, in other blocks. Method: the same.
#[test]
fn an_ext4_with_files_in_inodes_is_read_as_the_kernel_reads_it() {
    let options = ["-b", "4096", "-I", "512", "-O", "inline_data"];
    same_both_ways("unmounted: ext4, inline data", &options, "commit=1");
}

/// Goal: the same where files go through the journal whole, which has no checksums. Method: the same.
#[test]
fn an_ext4_with_data_in_its_journal_is_read_as_the_kernel_reads_it() {
    let options = ["-O", "^metadata_csum,^64bit"];
    same_both_ways("unmounted: ext4, data=journal", &options, "data=journal");
}

/// Goal: the same of ext3, without extents. Method: the same.
#[test]
fn an_ext3_is_read_as_the_kernel_reads_it() {
    same_both_ways("unmounted: ext3", &["-O", "^extent,^64bit,^flex_bg"], "commit=1");
}

fn same_both_ways(name: &str, make: &[&str], options: &str) {
    system_test(name, &["mkfs.ext4", "setpriv"], |scene| {
        let mut rng = scene.rng();
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(DEVICE_BYTES))?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        let make = cmd("mkfs.ext4").args(["-q", "-F"]).args(make);
        make.arg(device.path()).run()?.success()?;
        let mount = Mount::with_options(device.path(), "ext4", &scene.path("mnt"), options)?;
        fs::create_dir(mount.dir().join("mix"))?;
        mount.sync()?;
        let first = WallNs::now();
        let writers = Mix::on_files(&mount.dir().join("mix"), &mut rng, 1, WRITER_BYTES_PER_SECOND)?;
        for round in 0..scene.moments() as u64 * 2 {
            churn(mount.dir(), round, &mut rng)?;
            if rng.one_in(3) {
                mount.sync()?;
            }
        }
        let last = WallNs::now();
        writers.stop()?;
        mount.unmount()?;
        agent.wait_and_check()?;
        let restore = Restore::from(plan.store())?;
        for _ in 0..scene.moments() {
            compare(scene, &restore, WallNs::random_between(&mut rng, first, last))?;
        }
        agent.stop()
    });
}

/// One more folder of files of all kinds; one of those before goes.
fn churn(root: &Path, round: u64, rng: &mut Rng) -> Result<()> {
    let folder = root.join(format!("folder {round}"));
    fs::create_dir(&folder)?;
    for index in 0..40 {
        let path = folder.join(format!("file {index}"));
        let file = File::create(&path)?;
        let mut bytes = vec![0; rng.below(20_000) as usize];
        rng.fill_noise(&mut bytes);
        match index % 8 {
            0 => symlink(
                format!("file {}", "x".repeat(rng.below(200) as usize)),
                folder.join(format!("link {index}")),
            )?,
            1 => fs::hard_link(&path, folder.join(format!("second {index}")))?,
            // Not there on ext3.
            2 => drop(rustix::fs::fallocate(
                &file,
                rustix::fs::FallocateFlags::empty(),
                0,
                100_000,
            )),
            3 => file.set_len(rng.below(1 << 20))?,
            _ => {}
        }
        file.write_all_at(&bytes, rng.below(100_000))?;
        if index % 8 == 4 {
            file.set_len(rng.below(50_000))?;
        }
        let value = [b'v'; 200];
        let value = &value[..rng.below(200) as usize];
        rustix::fs::setxattr(&path, "user.note", value, rustix::fs::XattrFlags::empty())?;
    }
    if let Some(old) = round.checked_sub(FOLDERS) {
        fs::remove_dir_all(root.join(format!("folder {old}")))?;
    }
    Ok(())
}

/// Copies a moment both ways.
fn compare(scene: &Scene, restore: &Restore, at: WallNs) -> Result<()> {
    let copy = |name: &str, may_mount: bool| -> Result<(PathBuf, BTreeMap<PathBuf, Facts>)> {
        let to = scene.path(name);
        let files = restore
            .command("files")
            .args(["v", "--at", &at.to_string(), "--to"])
            .arg(&to);
        let files = match may_mount {
            true => files,
            false => files.without("-sys_admin"),
        };
        let ran = files.run()?.success()?;
        ensure!(ran.stderr.is_empty(), "{}", ran.transcript());
        let facts = facts_in(&to)?;
        Ok((to, facts))
    };
    // A file's time is that of the kernel's last tick.
    let began = WallNs(WallNs::now().0 - 10_000_000);
    let (mounted, expected) = copy("mounted", true)?;
    let (read, found) = copy("read", false)?;
    for (path, facts) in &expected {
        let found = found.get(path);
        // A file of which a part was being cut off is cut again by who mounts it, and is of that time then.
        let is_cut_by_the_mount = facts.time >= began;
        let mut facts = facts.clone();
        if let Some(found) = found.filter(|_| is_cut_by_the_mount) {
            ensure!(
                found.time <= at,
                "at {at}: {} is of {}",
                path.display(),
                found.time
            );
            facts.time = found.time;
        }
        ensure!(
            found == Some(&facts),
            "at {at}: {} is {found:?}, not {facts:?}",
            path.display()
        );
    }
    ensure!(
        found.len() == expected.len(),
        "at {at}: there is more than there was"
    );
    fs::remove_dir_all(mounted)?;
    fs::remove_dir_all(read).context("remove what was read")
}

/// What a copy of a file tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    mode: u32,
    owner: (u32, u32),
    /// When it was changed last.
    time: WallNs,
    bytes: u64,
    names: u64,
    /// Or target.
    content: String,
    attribute: Vec<u8>,
}

fn facts_in(dir: &Path) -> Result<BTreeMap<PathBuf, Facts>> {
    let facts = files_in(dir)?.into_iter().map(|(path, content)| {
        let full = dir.join(&path);
        let metadata = fs::symlink_metadata(&full)?;
        let (content, size) = match metadata.file_type() {
            kind if kind.is_symlink() => (fs::read_link(&full)?.display().to_string(), metadata.len()),
            // As large as its file system makes it.
            kind if kind.is_dir() => (content, 0),
            _ => (content, metadata.len()),
        };
        let mut note = vec![0; 4096];
        let bytes = rustix::fs::lgetxattr(&full, "user.note", &mut note[..]).unwrap_or(0);
        note.truncate(bytes);
        let links = if metadata.is_dir() { 0 } else { metadata.nlink() };
        let facts = Facts {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            time: WallNs(metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec()),
            bytes: size,
            names: links,
            content,
            attribute: note,
        };
        Ok((path, facts))
    });
    facts.collect()
}
