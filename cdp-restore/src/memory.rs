//! How much memory a restore may use.

use std::fs;
use std::path::Path;

/// Of the memory that the kernel can give, or that the control group (v2) leaves, whichever is less, one part of so many:
/// what else runs on the host must not be pushed out.
const SHARE: u64 = 4;
/// No more than that: index entries of as much of a volume are held at a time.
const GATHER_BYTES_MAX: u64 = 2 << 30;
/// Less would not help.
const GATHER_BYTES_MIN: u64 = 64 << 20;

/// Bytes in which a copy may put together what lies scattered in the history.
pub(crate) fn to_gather_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    gather_bytes(
        available_bytes(&meminfo),
        left_in_groups(Path::new("/sys/fs/cgroup"), &groups),
    )
}

fn gather_bytes(available_bytes: Option<u64>, left_bytes: Option<u64>) -> u64 {
    let least = available_bytes.into_iter().chain(left_bytes).min();
    let bytes = least.map_or(GATHER_BYTES_MIN, |bytes| bytes / SHARE);
    match bytes < GATHER_BYTES_MIN {
        true => 0,
        false => bytes.min(GATHER_BYTES_MAX),
    }
}

/// What the kernel expects to be able to give without swapping, from `/proc/meminfo`.
fn available_bytes(meminfo: &str) -> Option<u64> {
    let kibibytes = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB"))?;
    kibibytes.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What a control group and those that it lies in leave of their limits, page cache that is not in use given back; `groups`
/// is `/proc/self/cgroup`.
fn left_in_groups(root: &Path, groups: &str) -> Option<u64> {
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let left_in = |folder: &Path| -> Option<u64> {
        let read = |name| fs::read_to_string(root.join(folder).join(name)).ok();
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let limit = number(&read("memory.max")?)?;
        let used = read("memory.current").as_deref().and_then(number).unwrap_or(0);
        let stat = read("memory.stat").unwrap_or_default();
        let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
        let cached = cached.and_then(number).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(cached)))
    };
    Path::new(group).ancestors().filter_map(left_in).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_what_there_is_within_bounds() {
        const GIB: u64 = 1 << 30;
        assert_eq!(gather_bytes(None, None), GATHER_BYTES_MIN);
        assert_eq!(gather_bytes(Some(4 * GIB), None), GIB);
        assert_eq!(gather_bytes(Some(4 * GIB), Some(2 * GIB)), GIB / 2);
        assert_eq!(gather_bytes(Some(1 << 20), Some(2 * GIB)), 0);
        assert_eq!(gather_bytes(Some(64 * GIB), Some(u64::MAX)), GATHER_BYTES_MAX);
    }

    #[test]
    fn what_the_kernel_has_is_read_as_it_tells_it() {
        let meminfo = "MemTotal:       24681904 kB\nMemFree:        1 kB\nMemAvailable:   22133128 kB\n";
        assert_eq!(available_bytes(meminfo), Some(22_133_128 << 10));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
    }

    /// Goal: a limit further up counts too, and what others use of it. Method: a group without a limit in one that has
    /// one.
    #[test]
    fn the_group_that_leaves_least_counts() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("system.slice/restore.service");
        fs::create_dir_all(&group).unwrap();
        let groups = "1:name=systemd:/\n0::/system.slice/restore.service\n";
        let left = || left_in_groups(root.path(), groups);
        assert_eq!(left(), None);
        fs::write(group.join("memory.max"), "max\n").unwrap();
        fs::write(root.path().join("system.slice/memory.max"), "1073741824\n").unwrap();
        assert_eq!(left(), Some(1 << 30));
        fs::write(root.path().join("system.slice/memory.current"), "1000000000\n").unwrap();
        assert_eq!(left(), Some((1 << 30) - 1_000_000_000));
        let stat = "anon 1\ninactive_file 900000000\nactive_file 5\n";
        fs::write(root.path().join("system.slice/memory.stat"), stat).unwrap();
        assert_eq!(left(), Some((1 << 30) - 100_000_000));
        fs::write(group.join("memory.max"), "536870912\n").unwrap();
        assert_eq!(left(), Some(512 << 20));
    }
}
