//! The ways back to a running database, each with what it needs made beforehand.

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use cdp_tests::Scene;
use cdp_tests::moments::WallNs;
use cdp_tests::postgres::Server;
use cdp_tests::process::{Cmd, cmd, has_program};
use cdp_tests::restore::Restore;
use cdp_tests::view::View;

const BACKUP_TIMEOUT: Duration = Duration::from_secs(900);
/// restic encrypts always.
const RESTIC_PASSWORD: &str = "of the bench";
/// The data folder's name, wherever it is brought back.
const DATA: &str = "data";

/// A way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// A mount of the moment; PostgreSQL recovers as after a crash.
    Mount,
    Restic,
    Borg,
    /// A base backup is copied, and PostgreSQL replays archived WAL up to the moment.
    Replay,
}

impl Way {
    pub(super) const ALL: [Way; 4] = [Way::Mount, Way::Restic, Way::Borg, Way::Replay];

    /// As the table names it.
    pub(super) fn in_words(self) -> &'static str {
        match self {
            Way::Mount => "`cdp-restore mount --rw`",
            Way::Restic => "`restic restore`",
            Way::Borg => "`borg extract`",
            Way::Replay => "copy of `pg_basebackup`, WAL replayed",
        }
    }

    /// Debian's package and the program in it, where it is not PostgreSQL's.
    fn tool(self) -> Option<(&'static str, &'static str)> {
        match self {
            Way::Mount | Way::Replay => None,
            Way::Restic => Some(("restic", "restic")),
            Way::Borg => Some(("borgbackup", "borg")),
        }
    }

    pub(super) fn package(self) -> Option<&'static str> {
        self.tool().map(|(package, _)| package)
    }

    pub(super) fn is_here(self) -> bool {
        self.tool().is_none_or(|(_, program)| has_program(program))
    }

    /// Or only that of its backup.
    pub(super) fn brings_any_moment(self) -> bool {
        matches!(self, Way::Mount | Way::Replay)
    }
}

/// A data folder that was brought back.
pub(super) struct Place {
    pub(super) data: PathBuf,
    /// What PostgreSQL is started with there.
    pub(super) settings: Vec<String>,
    way: Way,
}

/// What all ways bring back from.
pub(super) struct Backups<'a> {
    scene: &'a Scene,
    /// The data folder that is backed up.
    data: PathBuf,
    view: View,
    /// What is gone back to, once it has passed.
    pub(super) moment: Option<WallNs>,
}

impl<'a> Backups<'a> {
    /// Of the data folder `data`, whose volume `v` is recorded in `store`.
    pub(super) fn new(scene: &'a Scene, store: &Path, data: &Path) -> Result<Backups<'a>> {
        let backups = Backups {
            scene,
            data: data.to_owned(),
            view: View::new(scene, Restore::from(store)?)?,
            moment: None,
        };
        backups.make_for_postgres(&backups.archive())?;
        Ok(backups)
    }

    /// Where WAL is archived.
    pub(super) fn archive(&self) -> PathBuf {
        self.scene.path("archive")
    }

    fn base(&self) -> PathBuf {
        self.scene.path("base")
    }

    fn restored(&self) -> PathBuf {
        self.scene.path("restored")
    }

    /// A new folder that is PostgreSQL's alone, as it wants its data to be.
    fn make_for_postgres(&self, folder: &Path) -> Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("make {}", folder.display()))?;
        self.give_to_postgres(folder)
    }

    fn give_to_postgres(&self, path: &Path) -> Result<()> {
        let owner = fs::metadata(&self.data).context("look at the data folder")?;
        chown(path, Some(owner.uid()), Some(owner.gid()))
            .with_context(|| format!("give {} to postgres", path.display()))
    }

    /// Leaves nothing in the user's home.
    fn restic(&self) -> Cmd {
        cmd("restic")
            .env("RESTIC_REPOSITORY", self.scene.path("restic"))
            .env("RESTIC_PASSWORD", RESTIC_PASSWORD)
            .env("RESTIC_CACHE_DIR", self.scene.path("restic-cache"))
            .timeout(BACKUP_TIMEOUT)
    }

    /// The same.
    fn borg(&self) -> Cmd {
        cmd("borg")
            .env("BORG_REPO", self.scene.path("borg"))
            .env("BORG_BASE_DIR", self.scene.path("borg-home"))
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
            .timeout(BACKUP_TIMEOUT)
    }

    /// With restic and with borg, where they are installed. Nobody may write meanwhile.
    pub(super) fn copy_files(&self) -> Result<()> {
        let above = self.data.parent().context("a folder above the data")?;
        if Way::Restic.is_here() {
            self.restic().arg("init").run()?.success()?;
            let backup = self.restic().args(["backup", DATA]).current_dir(above);
            backup.run()?.success()?;
        }
        if Way::Borg.is_here() {
            let init = self.borg().args(["init", "--encryption=none"]);
            init.run()?.success()?;
            let create = self.borg().args(["create", "::backup", DATA]);
            create.current_dir(above).run()?.success()?;
        }
        Ok(())
    }

    /// With `pg_basebackup` from a running server, ready to replay WAL onto it.
    pub(super) fn copy_base(&self, server: &Server) -> Result<()> {
        let base = self.base();
        self.make_for_postgres(&base)?;
        let backup = server.client("pg_basebackup").args(["--checkpoint=fast", "-D"]);
        backup.arg(&base).timeout(BACKUP_TIMEOUT).run()?.success()?;
        let signal = base.join("recovery.signal");
        fs::write(&signal, "").with_context(|| format!("write {}", signal.display()))?;
        self.give_to_postgres(&signal)
    }

    /// Brings the data folder back so far that PostgreSQL can be started on it.
    pub(super) fn bring(&self, way: Way) -> Result<Place> {
        let moment = self.moment.context("the moment has not come")?.to_string();
        let restored = self.restored();
        if way != Way::Mount {
            fs::create_dir(&restored).with_context(|| format!("make {}", restored.display()))?;
        }
        let data = restored.join(DATA);
        let settings = match way {
            Way::Mount => {
                self.view.mount(&moment, &["--rw"])?.success()?;
                return Ok(Place {
                    data: self.view.dir().join(DATA),
                    settings: Vec::new(),
                    way,
                });
            }
            Way::Restic => {
                let restore = self.restic().args(["restore", "latest", "--target"]);
                restore.arg(&restored).run()?.success()?;
                Vec::new()
            }
            Way::Borg => {
                let extract = self.borg().args(["extract", "::backup"]);
                extract.current_dir(&restored).run()?.success()?;
                Vec::new()
            }
            Way::Replay => {
                let copy = cmd("cp").args(["--archive", "--reflink=never"]);
                let copy = copy.arg(self.base()).arg(&data).timeout(BACKUP_TIMEOUT);
                copy.run()?.success()?;
                vec![
                    format!("restore_command=cp {}/%f %p", self.archive().display()),
                    // On its command line, PostgreSQL does not know yet what Z is.
                    format!("recovery_target_time={}", moment.replace('Z', "+00")),
                    "recovery_target_action=promote".to_owned(),
                    // It answers when it is at the moment, not on the way there.
                    "hot_standby=off".to_owned(),
                ]
            }
        };
        Ok(Place { data, settings, way })
    }

    /// Removes what was brought back.
    pub(super) fn clear(&self, place: Place) -> Result<()> {
        if place.way == Way::Mount {
            return self.view.try_unmount()?.success().map(drop);
        }
        fs::remove_dir_all(self.restored()).context("remove what was restored")
    }
}
