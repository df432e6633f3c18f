//! `cdp-agent doctor`: can this host be protected? Each line `ok`, `warn` or `fail`, with the mend.

use std::io::Write as _;
use std::path::Path;

use cdp_journal::units::parse_bytes;
use serde::Serialize;

use crate::capture::{Probe, btf::Btf};

/// Since when the kernel has what the probe uses (`bpf_loop`).
const KERNEL_MIN: (u32, u32) = (5, 17);
const PROBE_RING_BYTES: u32 = 2 << 20;
const MEMORY_MIN_BYTES: u64 = 512 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<&'static str>,
}

fn ok(check: &'static str, found: impl Into<String>) -> Check {
    Check {
        check,
        verdict: Verdict::Ok,
        found: found.into(),
        mend: None,
    }
}

fn warn(check: &'static str, found: impl Into<String>, mend: &'static str) -> Check {
    Check {
        check,
        verdict: Verdict::Warn,
        found: found.into(),
        mend: Some(mend),
    }
}

fn fail(check: &'static str, found: impl Into<String>, mend: &'static str) -> Check {
    Check {
        check,
        verdict: Verdict::Fail,
        found: found.into(),
        mend: Some(mend),
    }
}

/// Prints all checks; an error if any failed.
pub(crate) fn run(json: bool) -> anyhow::Result<()> {
    let checks = [
        kernel(),
        btf(),
        privileges(),
        memory(),
        clock(),
        loop_devices(),
        mkfs(),
        probe(),
    ];
    let failed = checks
        .iter()
        .filter(|check| check.verdict == Verdict::Fail)
        .count();
    let mut out = std::io::stdout().lock();
    if json {
        let report = serde_json::json!({ "ready": failed == 0, "checks": checks });
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        for check in &checks {
            let word = match check.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warn => "warn",
                Verdict::Fail => "fail",
            };
            writeln!(out, "{word}  {:<14} {}", check.check, check.found)?;
            if let Some(mend) = check.mend {
                writeln!(out, "      {:<14} -> {mend}", "")?;
            }
        }
    }
    anyhow::ensure!(
        failed == 0,
        "{failed} of {} checks failed: this host cannot be protected yet",
        checks.len()
    );
    Ok(())
}

fn kernel() -> Check {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut parts = release.split(['.', '-']).filter_map(|part| part.parse().ok());
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if version >= KERNEL_MIN {
        ok("kernel", format!("Linux {release}"))
    } else {
        fail(
            "kernel",
            format!("Linux {release}"),
            "the probe needs Linux 5.17 or later (bpf_loop)",
        )
    }
}

fn btf() -> Check {
    match Btf::of_running_kernel().and_then(|btf| btf.kernel()) {
        Ok(_) => ok("btf", "all fields that the probe reads are described"),
        Err(error) => fail(
            "btf",
            error.to_string(),
            "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y",
        ),
    }
}

fn privileges() -> Check {
    if rustix::process::geteuid().is_root() {
        ok("privileges", "root")
    } else {
        fail(
            "privileges",
            format!("uid {}", rustix::process::geteuid().as_raw()),
            "run as root, e.g. with sudo",
        )
    }
}

fn memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| parse_bytes(&rest.replace("kB", "KiB").replace(' ', "")).ok())
        .unwrap_or(0);
    let found = format!("{} MiB available", available >> 20);
    if available >= MEMORY_MIN_BYTES {
        ok("memory", found)
    } else {
        warn(
            "memory",
            found,
            "the agent uses up to 512 MiB: free some, or set a smaller --ring-bytes",
        )
    }
}

fn clock() -> Check {
    let flags = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let source = flags.map_or_else(|_| "unknown".into(), |text| text.trim().to_owned());
    let synchronised = Path::new("/run/systemd/timesync/synchronized").exists()
        || Path::new("/run/chrony").exists()
        || Path::new("/run/ntpd.pid").exists();
    if synchronised {
        ok("clock", format!("{source}, synchronised"))
    } else {
        warn(
            "clock",
            format!("{source}, no time service seen"),
            "times name moments: run chrony or systemd-timesyncd",
        )
    }
}

fn loop_devices() -> Check {
    if Path::new("/dev/loop-control").exists() {
        ok("loop devices", "/dev/loop-control")
    } else {
        fail(
            "loop devices",
            "no /dev/loop-control",
            "load the loop module: the probe is proven on a loop device",
        )
    }
}

fn mkfs() -> Check {
    match std::process::Command::new("mkfs.ext4").arg("-V").output() {
        Ok(_) => ok("e2fsprogs", "mkfs.ext4"),
        Err(error) => fail(
            "e2fsprogs",
            format!("mkfs.ext4: {error}"),
            "install e2fsprogs: calibration uses it",
        ),
    }
}

fn probe() -> Check {
    if !rustix::process::geteuid().is_root() {
        return fail("probe", "not tried", "run as root");
    }
    match Probe::load(PROBE_RING_BYTES) {
        Ok(_) => ok(
            "probe",
            "BTF tracepoints load, and known bytes were read back exactly",
        ),
        Err(error) => fail(
            "probe",
            format!("{error:#}"),
            "see the message; BPF must be allowed (no lockdown=confidentiality)",
        ),
    }
}
