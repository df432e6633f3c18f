//! `cargo xtask boot`: a small machine boots from a moment that `cdp-restore nbd` serves.
//!
//! The emulator, a boot loader and a kernel are Debian's, unpacked into the cache and not installed: its `qemu-system-x86`
//! would take the place of a newer `qemu-utils`. All that makes a disk boot is written while an agent watches; then the disk
//! is overwritten, and the machine starts from the moment before. Its kernel reads what was written then, and writes into
//! the layer that is thrown away.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cdp_tests::Scene;
use cdp_tests::agent::AgentPlan;
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fingerprint::Fingerprint;
use cdp_tests::fio::write_randomly;
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::mount::Mount;
use cdp_tests::process::cmd;
use cdp_tests::restore::Restore;

use crate::demo::{Story, again_as_root, on_a_scene, prepare};
use crate::workspace::Workspace;
use crate::{apt, sh};

const DISK_BYTES: u64 = 128 * MIB;
const DATA_BYTES: usize = 8 << 20;
/// Without the processor's help a machine starts in some seconds.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// The kernel's modules for the disk, each after those that it needs.
const MODULES: [&str; 6] = [
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
];

/// The programs of its first process, all of them busybox.
const APPLETS: [&str; 9] = [
    "sh",
    "mkdir",
    "mount",
    "umount",
    "insmod",
    "cat",
    "sha256sum",
    "cut",
    "poweroff",
];

/// How to run it.
#[derive(clap::Args, Default)]
pub(crate) struct BootArgs {
    /// The machine and the binaries are ready (said by this program to its own second half)
    #[arg(long, hide = true)]
    prepared: bool,
}

/// Prepares the machine, builds, and boots.
pub(crate) fn run(workspace: &Workspace, args: &BootArgs) -> Result<()> {
    if !args.prepared {
        prepare(workspace)?;
    }
    if !sh::is_root() {
        return again_as_root(workspace, &["boot", "--prepared"].map(str::to_owned));
    }
    let parts = Parts::get(workspace)?;
    on_a_scene(workspace, &["mkfs.ext4", "fio"], |scene| boot(scene, &parts))
}

fn boot(scene: &Scene, parts: &Parts) -> Result<()> {
    let story = Story::begin();
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(DISK_BYTES))?;
    let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("vm", device.path());
    let mut agent = plan.protect()?;
    let marker = format!("marker of {}", WallNs::now());
    let mut data = vec![0; DATA_BYTES];
    scene.rng().fill_noise(&mut data);
    parts.install_on(scene, device.path(), &marker, &data)?;
    let moment = QuietMoment::of_raw("vm", device.path())?;
    story.tell("a disk that boots was written while the agent watched");
    let before = Fingerprint::of_device(device.path())?;
    write_randomly(device.path(), "ruin", DISK_BYTES, scene.seed(), scene.dir())?;
    ensure!(
        before.sha256() != Fingerprint::of_device(device.path())?.sha256(),
        "the disk is not ruined"
    );
    agent.wait_and_check()?;
    story.tell("all of it was overwritten with noise");

    let restore = Restore::from(plan.store())?;
    let at = moment.to.to_string();
    let console = scene.log("console");
    restore.serve_nbd(scene, "vm", &["--at", &at, "--rw"], |uri| {
        parts.start_machine(uri, &console)
    })?;
    let said = fs::read_to_string(&console).context("read the console")?;
    let sum = scene.path("data");
    fs::write(&sum, &data).context("write what is expected")?;
    for (what, expected) in [
        (
            "read what was there then",
            format!("READ {marker} {}", sh::sha256(&sum)?),
        ),
        ("read again what it had written", "WROTE by the guest".to_owned()),
    ] {
        ensure!(
            said.lines().any(|line| line.trim_end() == expected),
            "the console does not say `{expected}`"
        );
        story.tell(format!("the machine booted from {at} over NBD and {what}"));
    }
    moment.check_at(&restore, &at, &scene.path("image"))?;
    story.tell("the moment is still what the disk held then, byte for byte");
    agent.stop()
}

/// What a machine is made of, unpacked.
struct Parts {
    dir: PathBuf,
    /// The kernel's release.
    release: String,
}

impl Parts {
    fn get(workspace: &Workspace) -> Result<Parts> {
        let dir = workspace.cache.join("boot");
        let _lock = workspace.lock("boot")?;
        let complete = dir.join("complete");
        if !complete.exists() {
            ensure!(
                apt::is_here(),
                "the parts of a machine are unpacked from Debian's packages: there is no apt-get here"
            );
            // Of an earlier attempt another kernel may be there.
            if dir.exists() {
                fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
            }
            sh::step("get an emulator, a boot loader and a kernel", || {
                let mut packages = vec![
                    "qemu-system-x86".to_owned(),
                    "extlinux".into(),
                    "busybox-static".into(),
                ];
                let needed = apt::depends("qemu-system-x86")?;
                let needed: Vec<&str> = needed.iter().map(String::as_str).collect();
                packages.extend(apt::missing(&needed)?.into_iter().map(str::to_owned));
                packages.extend(apt::depends("linux-image-cloud-amd64")?);
                apt::unpack(&packages, &dir)
            })?;
            fs::write(&complete, "").with_context(|| format!("write {}", complete.display()))?;
        }
        let kernels = dir.join("boot");
        let entries = fs::read_dir(&kernels).with_context(|| format!("list {}", kernels.display()))?;
        let release = entries
            .filter_map(|entry| {
                entry
                    .ok()?
                    .file_name()
                    .to_str()?
                    .strip_prefix("vmlinuz-")
                    .map(str::to_owned)
            })
            .next()
            .with_context(|| format!("no kernel in {}", kernels.display()))?;
        Ok(Parts { dir, release })
    }

    /// Makes a disk that boots: ext4 without a partition table, a boot loader in its first sectors.
    fn install_on(&self, scene: &Scene, device: &Path, marker: &str, data: &[u8]) -> Result<()> {
        // The boot loader knows no newer features.
        cmd("mkfs.ext4")
            .args(["-q", "-F", "-O", "^64bit,^metadata_csum"])
            .arg(device)
            .run()?
            .success()?;
        let mount = Mount::with_options(device, "ext4", &scene.path("installed"), "rw")?;
        let root = mount.dir();
        let copy = |from: &Path, name: &str| {
            fs::copy(from, root.join(name)).with_context(|| format!("copy {}", from.display()))
        };
        copy(
            &self.dir.join("boot").join(format!("vmlinuz-{}", self.release)),
            "vmlinuz",
        )?;
        copy(&self.make_initramfs(scene)?, "initrd.gz")?;
        fs::write(root.join("marker"), marker)?;
        fs::write(root.join("data"), data)?;
        fs::write(
            root.join("extlinux.conf"),
            "SERIAL 0 115200\nDEFAULT linux\nLABEL linux\nLINUX /vmlinuz\nINITRD /initrd.gz\nAPPEND console=ttyS0 quiet panic=-1\n",
        )?;
        cmd(self.dir.join("usr/bin/extlinux"))
            .arg("--install")
            .arg(root)
            .run()?
            .success()?;
        mount.unmount()
    }

    /// What the machine does: it reads from its disk, writes to it, reads that after a new mount, and goes off.
    fn make_initramfs(&self, scene: &Scene) -> Result<PathBuf> {
        let dir = scene.path("initramfs");
        fs::create_dir_all(dir.join("bin")).context("make the initramfs")?;
        let busybox = self.dir.join("bin/busybox");
        fs::copy(&busybox, dir.join("bin/busybox")).context("copy busybox")?;
        for name in APPLETS {
            symlink("busybox", dir.join("bin").join(name)).with_context(|| format!("link {name}"))?;
        }
        let drivers = self
            .dir
            .join("lib/modules")
            .join(&self.release)
            .join("kernel/drivers");
        let mut script = String::from("#!/bin/sh\nmkdir /dev /mnt\nmount -t devtmpfs dev /dev\n");
        for module in MODULES {
            let name = module.rsplit('/').next().unwrap_or(module);
            let from = drivers.join(format!("{module}.ko"));
            fs::copy(&from, dir.join(format!("{name}.ko")))
                .with_context(|| format!("copy {}", from.display()))?;
            script.push_str(&format!("insmod /{name}.ko\n"));
        }
        let begin = "mount -t ext4 /dev/vda /mnt || poweroff -f\n";
        script.push_str(begin);
        script.push_str("echo \"READ $(cat /mnt/marker) $(sha256sum < /mnt/data | cut -c1-64)\"\n");
        script.push_str("echo by the guest > /mnt/written\numount /mnt\n");
        script.push_str(begin);
        script.push_str("echo \"WROTE $(cat /mnt/written)\"\numount /mnt\npoweroff -f\n");
        let init = dir.join("init");
        fs::write(&init, script).context("write init")?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).context("make init executable")?;
        let packed = scene.path("initrd.gz");
        let mut pack = Command::new("sh");
        pack.arg("-c")
            .arg("cd \"$1\" && find . | \"$2\" cpio -o -H newc 2>/dev/null | gzip -1 > \"$3\"")
            .args([
                "sh".as_ref(),
                dir.as_os_str(),
                busybox.as_os_str(),
                packed.as_os_str(),
            ]);
        sh::capture(&mut pack)?;
        Ok(packed)
    }

    /// Runs a machine until it goes off.
    fn start_machine(&self, disk: &str, console: &Path) -> Result<()> {
        let libraries = self.dir.join("usr/lib/x86_64-linux-gnu");
        // Of the processor's own help some hosts have only a part.
        cmd(self.dir.join("usr/bin/qemu-system-x86_64"))
            .env(
                "LD_LIBRARY_PATH",
                format!("{}:{}", libraries.display(), self.dir.join("usr/lib").display()),
            )
            .env("QEMU_MODULE_DIR", libraries.join("qemu"))
            .arg("-L")
            .arg(self.dir.join("usr/share/qemu"))
            .arg("-L")
            .arg(self.dir.join("usr/share/seabios"))
            .args([
                "-accel",
                "tcg",
                "-m",
                "512",
                "-display",
                "none",
                "-nic",
                "none",
                "-no-reboot",
            ])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .args(["-drive", &format!("file={disk},format=raw,if=virtio")])
            .timeout(BOOT_TIMEOUT)
            .run()?
            .success()
            .map(drop)
    }
}
