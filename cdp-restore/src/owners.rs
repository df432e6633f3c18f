//! Which file of a mounted moment some bytes of its volume belong to.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::ops::ControlFlow;
use std::path::Path;

use crate::interrupt::Interrupt;
use crate::placement::Placement;
use crate::walk::{WalkError, open, walk};

/// Why a walk ended early: an error, or nothing is left to be found.
struct Stopped(Option<WalkError>);

impl From<WalkError> for Stopped {
    fn from(error: WalkError) -> Self {
        Stopped(Some(error))
    }
}

/// Looks for the owners of `wanted` bytes of the volume among all that lies below `root`; of several (links to one
/// file, copies that share their bytes) the first by name. `false`: this file system does not tell.
pub(crate) fn find(
    root: &Path,
    placement: &Placement,
    prefix: &str,
    wanted: &mut BTreeMap<u64, Option<String>>,
    interrupt: &Interrupt,
) -> Result<bool, WalkError> {
    let mut missing = wanted.values().filter(|owner| owner.is_none()).count();
    let mut is_told = true;
    let mut look = |path: &Path, file: &File, name: String| -> Result<(), Stopped> {
        let told = placement.each(file, |stretch| {
            let owned = stretch.on_volume().map(|range| wanted.range_mut(range));
            for (_, owner) in owned.into_iter().flatten().filter(|(_, owner)| owner.is_none()) {
                *owner = Some(format!("{prefix}{name}"));
                missing -= 1;
            }
            match missing {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        // Some tell it of files alone.
        is_told = told.map_err(WalkError::at(path))? || name.is_empty() || name.ends_with('/');
        match missing > 0 && is_told {
            true => Ok(()),
            false => Err(Stopped(None)),
        }
    };
    let walked = open(root)
        .map_err(Stopped::from)
        .and_then(|file| look(root, &file, String::new()))
        .and_then(|()| {
            walk([Some(root), None], |pair| {
                let path = root.join(&pair.path);
                interrupt.check().map_err(WalkError::at(&path))?;
                let metadata = pair.sides[0].as_ref();
                let is_folder = metadata.is_some_and(Metadata::is_dir);
                if !is_folder && !metadata.is_some_and(Metadata::is_file) {
                    return Ok(());
                }
                let slash = if is_folder { "/" } else { "" };
                look(&path, &open(&path)?, format!("{}{slash}", pair.path.display()))
            })
        });
    match walked {
        Err(Stopped(Some(error))) => Err(error),
        _ => Ok(is_told),
    }
}
