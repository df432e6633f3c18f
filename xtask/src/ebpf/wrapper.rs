//! Stands between cargo and rustc while the probe is built, so that no path reaches the object.
//!
//! Two things would let paths in:
//! - file names, in BTF's line table and in panic messages: each folder that sources can lie in is
//!   renamed with `--remap-path-prefix`. Cargo tells the folder of the crate at hand, so registries,
//!   mirrors and vendored sources need no special care;
//! - cargo's `-C metadata`, a hash that covers the place of `core`'s sources and ends up in every
//!   mangled name: it is replaced by the crate's name.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Error, Result};

/// Set when this program is started as the wrapper.
pub(crate) const ACTIVE: &str = "CDP_PROBE_RUSTC_WRAPPER";
/// The folder of the clone.
pub(crate) const WORKSPACE: &str = "CDP_PROBE_WORKSPACE";
/// Cargo's output folder for the probe.
pub(crate) const TARGET_FOLDER: &str = "CDP_PROBE_TARGET_FOLDER";
/// The `library` folder of the compiler's sources.
pub(crate) const LIBRARY: &str = "CDP_PROBE_LIBRARY";

/// Becomes rustc. Comes back only if it cannot.
pub(crate) fn exec(arguments: impl Iterator<Item = OsString>) -> Result<()> {
    let mut arguments = arguments.skip(1);
    let rustc = arguments
        .next()
        .context("the wrapper was given no rustc to run")?;
    let arguments = rewrite(arguments.collect(), |name| std::env::var_os(name));
    let error = Command::new(&rustc).args(arguments).exec();
    Err(Error::new(error).context(format!("start {}", rustc.display())))
}

/// The arguments with which the crate comes out the same everywhere. Crates for the host (build
/// scripts, macros) and questions cargo asks of rustc stay as they are.
fn rewrite(mut arguments: Vec<OsString>, variable: impl Fn(&str) -> Option<OsString>) -> Vec<OsString> {
    let for_the_probe = arguments
        .windows(2)
        .any(|pair| pair[0] == "--target" && pair[1] == super::TARGET);
    let metadata = arguments.iter_mut().find(|argument| is_metadata(argument));
    let (true, Some(metadata), Some(crate_name)) = (for_the_probe, metadata, variable("CARGO_PKG_NAME"))
    else {
        return arguments;
    };
    *metadata = joined(&["metadata=".as_ref(), &crate_name]);
    let crate_folder = joined(&["/src/".as_ref(), &crate_name]);
    // The last one that matches counts: from the outermost folder to the innermost.
    let renamed = [
        (WORKSPACE, OsStr::new("/cdp")),
        (TARGET_FOLDER, OsStr::new("/target")),
        ("CARGO_MANIFEST_DIR", &crate_folder),
        (LIBRARY, OsStr::new("/rust/library")),
    ];
    for (name, to) in renamed {
        if let Some(from) = variable(name) {
            arguments.push(joined(&[
                "--remap-path-prefix=".as_ref(),
                &from,
                "=".as_ref(),
                to,
            ]));
        }
    }
    arguments
}

fn is_metadata(argument: &OsStr) -> bool {
    argument
        .to_str()
        .is_some_and(|argument| argument.starts_with("metadata="))
}

fn joined(parts: &[&OsStr]) -> OsString {
    parts.iter().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(arguments: &[&str], variables: &[(&str, &str)]) -> Vec<String> {
        let find = |name: &str| {
            variables
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| OsString::from(v))
        };
        let arguments = arguments.iter().map(OsString::from).collect();
        rewrite(arguments, find)
            .iter()
            .map(|argument| argument.to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn a_crate_of_the_probe_loses_its_hash_and_its_paths() {
        let variables = [
            (WORKSPACE, "/home/me/cdp"),
            ("CARGO_PKG_NAME", "aya-ebpf"),
            ("CARGO_MANIFEST_DIR", "/home/me/.cargo/aya"),
        ];
        let arguments = [
            "--crate-name",
            "aya_ebpf",
            "-C",
            "metadata=0123",
            "--target",
            "bpfel-unknown-none",
        ];
        assert_eq!(
            rewritten(&arguments, &variables),
            [
                "--crate-name",
                "aya_ebpf",
                "-C",
                "metadata=aya-ebpf",
                "--target",
                "bpfel-unknown-none",
                "--remap-path-prefix=/home/me/cdp=/cdp",
                "--remap-path-prefix=/home/me/.cargo/aya=/src/aya-ebpf",
            ]
        );
    }

    #[test]
    fn a_build_script_and_a_question_stay_as_they_are() {
        let variables = [
            ("CARGO_PKG_NAME", "aya-ebpf"),
            ("CARGO_MANIFEST_DIR", "/somewhere"),
        ];
        for arguments in [
            ["--crate-name", "build_script_build", "-C", "metadata=0123"],
            ["--print", "cfg", "--target", "bpfel-unknown-none"],
        ] {
            assert_eq!(rewritten(&arguments, &variables), arguments);
        }
    }
}
