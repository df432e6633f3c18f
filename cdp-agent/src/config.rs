//! Settings of `run`: flags over the file over defaults, all checked before anything starts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use cdp_journal::net::is_host_and_port;
use cdp_journal::ship::{Limits, Schedule};
use serde::Deserialize as _;

use crate::cli::RunArgs;

const KEYS: [&str; 12] = [
    "store",
    "volume",
    "server",
    "identity",
    "ring_bytes",
    "dirty_region_bytes",
    "commit_interval_ms",
    "encode_queue_bytes",
    "delta_cache_bytes",
    "store_bytes_max",
    "rate",
    "rate_readback",
];
const RING_BYTES_DEFAULT: u64 = 64 << 20;
const RING_BYTES_MIN: u64 = 1 << 20;
const RING_BYTES_MAX: u64 = 1 << 30;
const REGION_BYTES_DEFAULT: u64 = 64 << 10;
const REGION_BYTES_MIN: u64 = 4 << 10;
const REGION_BYTES_MAX: u64 = 16 << 20;
const COMMIT_INTERVAL_MS_DEFAULT: u64 = 20;
const COMMIT_INTERVAL_MS_MAX: u64 = 10_000;
const ENCODE_QUEUE_BYTES_DEFAULT: u64 = 64 << 20;
const ENCODE_QUEUE_BYTES_MIN: u64 = 4 << 20;
const ENCODE_QUEUE_BYTES_MAX: u64 = 4 << 30;
const DELTA_CACHE_BYTES_DEFAULT: u64 = 192 << 20;
const DELTA_CACHE_BYTES_MAX: u64 = 64 << 30;
const NAME_BYTES_MAX: usize = 64;
const SERVERS_MAX: usize = 8;

// A chunk of a bio has to fit in the smallest ring.
const _: () = assert!(RING_BYTES_MIN > cdp_ebpf::event::CHUNK_BYTES as u64 * 2);

/// A volume to protect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VolumeConfig {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

/// Checked settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) store: PathBuf,
    pub(crate) volumes: Vec<VolumeConfig>,
    /// Journal servers, as HOST:PORT.
    pub(crate) servers: Vec<String>,
    /// Where the certificates for them are; there if there are servers.
    pub(crate) identity: Option<PathBuf>,
    pub(crate) ring_bytes: u32,
    pub(crate) dirty_region_bytes: u64,
    pub(crate) commit_interval: Duration,
    pub(crate) encode_queue_bytes: u64,
    pub(crate) delta_cache_bytes: u64,
    pub(crate) store_bytes_max: Option<u64>,
    /// How fast all servers together are shipped to.
    pub(crate) rate: Schedule,
    /// How fast first copies and resyncs go.
    pub(crate) rate_readback: Schedule,
}

/// Settings that make no sense, or are missing: wrong usage, exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub(crate) struct Usage(anyhow::Error);

impl Config {
    /// Reads the file that the flags name, if any, and lays the flags over it. What they say together is checked: see
    /// [`Usage`].
    pub(crate) fn load(flags: &RunArgs) -> anyhow::Result<Self> {
        let file = match &flags.config {
            Some(path) => read_file(path)?,
            None => RunArgs::default(),
        };
        Self::over(flags, file).map_err(|error| Usage(error).into())
    }

    fn over(flags: &RunArgs, file: RunArgs) -> anyhow::Result<Self> {
        let store = flags
            .store
            .clone()
            .or(file.store)
            .context("no store: give --store DIR, or `store = \"DIR\"` in the file of --config")?;
        let volumes = if flags.volume.is_empty() {
            file.volume
        } else {
            flags.volume.clone()
        };
        ensure!(
            !volumes.is_empty(),
            "no volume: give --volume NAME=PATH, or `volume = [\"NAME=PATH\"]` in the file of --config"
        );
        let volumes = volumes
            .iter()
            .map(|text| parse_volume(text))
            .collect::<anyhow::Result<Vec<_>>>()?;
        for (i, volume) in volumes.iter().enumerate() {
            ensure!(
                volumes[..i].iter().all(|other| other.name != volume.name),
                "two volumes are called {}",
                volume.name
            );
        }
        let servers = if flags.server.is_empty() {
            file.server
        } else {
            flags.server.clone()
        };
        let identity = flags.identity.clone().or(file.identity);
        check_servers(&servers, identity.is_some())?;
        let ring_bytes = flags.ring_bytes.or(file.ring_bytes).unwrap_or(RING_BYTES_DEFAULT);
        let region_bytes = flags
            .dirty_region_bytes
            .or(file.dirty_region_bytes)
            .unwrap_or(REGION_BYTES_DEFAULT);
        let commit_ms = flags
            .commit_interval_ms
            .or(file.commit_interval_ms)
            .unwrap_or(COMMIT_INTERVAL_MS_DEFAULT);
        power_of_two("ring_bytes", ring_bytes, RING_BYTES_MIN, RING_BYTES_MAX)?;
        power_of_two(
            "dirty_region_bytes",
            region_bytes,
            REGION_BYTES_MIN,
            REGION_BYTES_MAX,
        )?;
        ensure!(
            (1..=COMMIT_INTERVAL_MS_MAX).contains(&commit_ms),
            "commit_interval_ms is {commit_ms}, must be from 1 to {COMMIT_INTERVAL_MS_MAX}"
        );
        let encode_queue_bytes = flags
            .encode_queue_bytes
            .or(file.encode_queue_bytes)
            .unwrap_or(ENCODE_QUEUE_BYTES_DEFAULT);
        ensure!(
            (ENCODE_QUEUE_BYTES_MIN..=ENCODE_QUEUE_BYTES_MAX).contains(&encode_queue_bytes),
            "encode_queue_bytes is {encode_queue_bytes}, must be from {ENCODE_QUEUE_BYTES_MIN} to \
             {ENCODE_QUEUE_BYTES_MAX}"
        );
        let delta_cache_bytes = flags
            .delta_cache_bytes
            .or(file.delta_cache_bytes)
            .unwrap_or(DELTA_CACHE_BYTES_DEFAULT);
        ensure!(
            delta_cache_bytes <= DELTA_CACHE_BYTES_MAX,
            "delta_cache_bytes is {delta_cache_bytes}, must be from 0 (no deltas) to {DELTA_CACHE_BYTES_MAX}"
        );
        let rate = schedule(
            "rate",
            if flags.rate.is_empty() {
                &file.rate
            } else {
                &flags.rate
            },
        )?;
        let rate_readback = if flags.rate_readback.is_empty() {
            &file.rate_readback
        } else {
            &flags.rate_readback
        };
        let rate_readback = schedule("rate_readback", rate_readback)?;
        Ok(Self {
            store,
            volumes,
            servers,
            identity,
            ring_bytes: ring_bytes as u32,
            dirty_region_bytes: region_bytes,
            commit_interval: Duration::from_millis(commit_ms),
            encode_queue_bytes,
            delta_cache_bytes,
            store_bytes_max: flags.store_bytes_max.or(file.store_bytes_max),
            rate,
            rate_readback,
        })
    }
}

fn schedule(key: &str, limits: &[String]) -> anyhow::Result<Schedule> {
    Schedule::parse(limits).with_context(|| key.to_owned())
}

fn check_servers(servers: &[String], has_identity: bool) -> anyhow::Result<()> {
    for (i, server) in servers.iter().enumerate() {
        ensure!(
            is_host_and_port(server),
            "server {server:?}: give it as HOST:PORT, such as dr1.example.org:7443"
        );
        ensure!(!servers[..i].contains(server), "server {server} is given twice");
    }
    ensure!(
        servers.len() <= SERVERS_MAX,
        "{} servers; {SERVERS_MAX} at most can be shipped to",
        servers.len()
    );
    ensure!(
        servers.is_empty() || has_identity,
        "no identity: a server needs --identity DIR, the folder that `cdp-agent enroll` put the certificate into"
    );
    Ok(())
}

fn power_of_two(key: &str, value: u64, min: u64, max: u64) -> anyhow::Result<()> {
    ensure!(
        value.is_power_of_two() && (min..=max).contains(&value),
        "{key} is {value}, must be a power of two from {min} to {max}"
    );
    Ok(())
}

fn parse_volume(text: &str) -> anyhow::Result<VolumeConfig> {
    let (name, path) = text
        .split_once('=')
        .with_context(|| format!("volume {text:?}: give it as NAME=PATH, such as pg=/dev/vdb"))?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    ensure!(
        !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.chars().all(plain) && !name.starts_with('.'),
        "volume name {name:?}: use letters, digits, `.`, `_` and `-`, at most {NAME_BYTES_MAX}"
    );
    ensure!(
        !path.is_empty(),
        "volume {name} has no path: give it as NAME=PATH"
    );
    Ok(VolumeConfig {
        name: name.to_owned(),
        path: PathBuf::from(path),
    })
}

/// From how much alike on a key is taken for a mistyped one.
const ALIKE_MIN: f64 = 0.8;

fn read_file(path: &Path) -> anyhow::Result<RunArgs> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let parsed = parse_file(&text).with_context(|| format!("{}", path.display()));
    parsed.map_err(|error| Usage(error).into())
}

fn parse_file(text: &str) -> anyhow::Result<RunArgs> {
    let table: toml::Table = text
        .parse()
        .map_err(|error: toml::de::Error| anyhow::anyhow!("{}", error.message()))?;
    let mut args = RunArgs::default();
    for (key, value) in &table {
        match key.as_str() {
            "store" => args.store = Some(PathBuf::from(string(key, value)?)),
            "volume" => args.volume = strings(key, value, "NAME=PATH")?,
            "server" => args.server = strings(key, value, "HOST:PORT")?,
            "identity" => args.identity = Some(PathBuf::from(string(key, value)?)),
            "ring_bytes" => args.ring_bytes = Some(bytes(key, value)?),
            "dirty_region_bytes" => args.dirty_region_bytes = Some(bytes(key, value)?),
            "commit_interval_ms" => args.commit_interval_ms = Some(bytes(key, value)?),
            "encode_queue_bytes" => args.encode_queue_bytes = Some(bytes(key, value)?),
            "delta_cache_bytes" => args.delta_cache_bytes = Some(bytes(key, value)?),
            "rate" => args.rate = limits(key, value)?,
            "rate_readback" => args.rate_readback = limits(key, value)?,
            "store_bytes_max" => args.store_bytes_max = Some(bytes(key, value)?),
            _ => {
                let alike = KEYS.iter().map(|known| (strsim::jaro_winkler(key, known), known));
                let nearest = alike.max_by(|(a, _), (b, _)| a.total_cmp(b));
                match nearest.filter(|(alike, _)| *alike >= ALIKE_MIN) {
                    Some((_, nearest)) => bail!("key {key:?} is not known; did you mean {nearest:?}?"),
                    None => bail!("key {key:?} is not known; there are {}", KEYS.join(", ")),
                }
            }
        }
    }
    Ok(args)
}

fn limits(key: &str, value: &toml::Value) -> anyhow::Result<Vec<String>> {
    let limits = Limits::deserialize(value.clone());
    let limits = limits.ok().with_context(|| {
        format!(
            "{key} is \"mon-fri 08:00-18:00 20 Mbit/s\", a list of such limits, or a table of times and their rates"
        )
    });
    limits.map(Vec::from)
}

fn strings(key: &str, value: &toml::Value, form: &str) -> anyhow::Result<Vec<String>> {
    if let Some(one) = value.as_str() {
        return Ok(vec![one.to_owned()]);
    }
    let list = value
        .as_array()
        .with_context(|| format!("{key} is \"{form}\", or a list of such"))?;
    list.iter().map(|item| string(key, item)).collect()
}

fn string(key: &str, value: &toml::Value) -> anyhow::Result<String> {
    value
        .as_str()
        .map(str::to_owned)
        .with_context(|| format!("{key} must be text"))
}

fn bytes(key: &str, value: &toml::Value) -> anyhow::Result<u64> {
    match value {
        toml::Value::Integer(number) => {
            let bytes = u64::try_from(*number).ok();
            bytes.with_context(|| format!("{key} is {number}, must not be negative"))
        }
        toml::Value::String(text) => {
            cdp_journal::units::parse_bytes(text).map_err(|why| anyhow::anyhow!("{key}: {why}"))
        }
        _ => bail!("{key} must be a number"),
    }
}

#[cfg(test)]
mod tests {
    use cdp_journal::ship::WINDOWS_MAX;

    use super::*;

    fn flags(volume: &str) -> RunArgs {
        RunArgs {
            store: Some("/s".into()),
            volume: vec![volume.into()],
            ..RunArgs::default()
        }
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = parse_file("store = \"/f\"\nring_bytes = 1048576\ncommit_interval_ms = 5").unwrap();
        assert_eq!(file.ring_bytes, Some(1 << 20));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(
            &path,
            "store = \"/f\"\nring_bytes = \"1MiB\"\ncommit_interval_ms = 5",
        )
        .unwrap();
        let mut flags = flags("pg=/dev/x");
        flags.config = Some(path);
        flags.commit_interval_ms = Some(7);
        let config = Config::load(&flags).unwrap();
        assert_eq!(config.store, PathBuf::from("/s"));
        assert_eq!(config.ring_bytes, 1 << 20);
        assert_eq!(config.commit_interval, Duration::from_millis(7));
    }

    #[test]
    fn a_server_needs_a_port_and_an_identity() {
        let mut flags = flags("pg=/dev/x");
        flags.server = vec!["dr1:7443".into()];
        let refused = |flags: &RunArgs| Config::load(flags).unwrap_err().to_string();
        assert!(refused(&flags).contains("--identity"));
        flags.identity = Some("/i".into());
        assert_eq!(Config::load(&flags).unwrap().servers, ["dr1:7443"]);
        flags.server.push("dr1:7443".into());
        assert!(refused(&flags).contains("twice"));
        for bad in ["dr1", ":7443", "dr1:x"] {
            flags.server = vec![bad.into()];
            assert!(refused(&flags).contains("HOST:PORT"), "{bad}");
        }
    }

    #[test]
    fn limits_are_one_text_a_list_or_a_table_and_flags_win() {
        let windows = |file: &str| parse_file(file).map(|args| args.rate);
        assert_eq!(windows("rate = \"5 MiB/s\"").unwrap(), ["5 MiB/s"]);
        let list = "rate = [\"mon-fri 08:00-18:00 20 Mbit/s\", \"1 Gbit/s\"]";
        assert_eq!(windows(list).unwrap().len(), 2);
        let table = "[rate]\n\"mon-fri 08:00-18:00\" = \"20 Mbit/s\"";
        assert_eq!(windows(table).unwrap(), ["mon-fri 08:00-18:00 20 Mbit/s"]);
        let mut flags = flags("pg=/dev/x");
        flags.rate = vec!["20 Mbit/s".into()];
        let config = Config::load(&flags).unwrap();
        assert!(!config.rate.is_empty() && config.rate_readback.is_empty());
        flags.rate_readback = vec!["20 apples".into()];
        let error = format!("{:#}", Config::load(&flags).unwrap_err());
        assert!(
            error.contains("rate_readback") && error.contains("apples"),
            "{error}"
        );
        flags.rate_readback = vec!["1 MiB/s".into(); WINDOWS_MAX + 1];
        let error = format!("{:#}", Config::load(&flags).unwrap_err());
        assert!(error.contains("at most"), "{error}");
    }

    #[test]
    fn an_unknown_key_names_the_nearest_one() {
        let error = parse_file("ring_byte = 1").unwrap_err().to_string();
        assert!(
            error.contains("\"ring_byte\"") && error.contains("\"ring_bytes\""),
            "{error}"
        );
        let error = parse_file("frob = 1").unwrap_err().to_string();
        assert!(
            !error.contains("did you mean") && error.contains("rate_readback"),
            "{error}"
        );
    }

    #[test]
    fn a_single_volume_or_server_needs_no_list() {
        let args = parse_file("volume = \"pg=/dev/x\"\nserver = [\"dr1:7443\"]").unwrap();
        assert_eq!(
            (args.volume, args.server),
            (vec!["pg=/dev/x".to_owned()], vec!["dr1:7443".to_owned()])
        );
        assert!(parse_file("volume = 1").is_err());
    }

    #[test]
    fn bad_values_are_named_with_their_bounds() {
        let mut flags = flags("pg=/dev/x");
        flags.ring_bytes = Some(1000);
        let error = Config::load(&flags).unwrap_err().to_string();
        assert!(
            error.contains("ring_bytes is 1000") && error.contains("power of two"),
            "{error}"
        );
        flags.ring_bytes = None;
        flags.encode_queue_bytes = Some(1 << 20);
        let error = Config::load(&flags).unwrap_err().to_string();
        assert!(error.contains("encode_queue_bytes is 1048576"), "{error}");
        flags.encode_queue_bytes = None;
        flags.delta_cache_bytes = Some(u64::MAX);
        let error = Config::load(&flags).unwrap_err().to_string();
        assert!(
            error.contains("delta_cache_bytes is 18446744073709551615"),
            "{error}"
        );
        for volume in ["pg", "=x", "a b=x", "pg=", "../x=y"] {
            assert!(parse_volume(volume).is_err(), "{volume}");
        }
    }
}
