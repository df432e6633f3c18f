//! One writer per store: a lock that dies with its holder.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::error::OpenError;

/// An exclusive lock on the store's lock file (an open file description lock: it is not lost when somebody else
/// in this process closes the file).
#[derive(Debug)]
pub(crate) struct StoreLock {
    file: File,
}

impl StoreLock {
    /// Takes the lock and leaves the process id in the file, for messages.
    pub(crate) fn take(path: &Path) -> Result<Self, OpenError> {
        let open = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let mut file = open.map_err(OpenError::io("open", path))?;
        let taken = lock(&file, libc::F_OFD_SETLK, libc::F_WRLCK).map(|_| ());
        if let Err(error) = taken {
            if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
                return Err(OpenError::io("lock", path)(error));
            }
            let mut pid = String::new();
            // Without the id the message is poorer, nothing else.
            let _ = file.read_to_string(&mut pid);
            let holder = match pid.trim().parse::<u32>() {
                Ok(pid) => format!("process {pid}"),
                Err(_) => "another process".to_owned(),
            };
            return Err(OpenError::Locked {
                path: path.to_owned(),
                holder,
            });
        }
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()));
        // A full disk must not keep the agent from starting.
        if let Err(error) = written {
            tracing::debug!(path = %path.display(), %error, "the process id was not left in the lock file");
        }
        Ok(Self { file })
    }

    /// Does anybody hold the lock? Asks without taking it.
    pub(crate) fn is_held(path: &Path) -> io::Result<bool> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        // A shared lock would conflict with the writer's exclusive one, and with nothing else.
        Ok(lock(&file, libc::F_OFD_GETLK, libc::F_RDLCK)? != libc::F_UNLCK)
    }
}

impl Drop for StoreLock {
    /// Not left to the closing of the file: a process that is just being started has a copy of the descriptor until
    /// its program runs, and with it the lock.
    fn drop(&mut self) {
        let _ = lock(&self.file, libc::F_OFD_SETLK, libc::F_UNLCK);
    }
}

/// Runs a lock command over the whole file; returns the kind of lock that the kernel answers with.
#[allow(
    unsafe_code,
    reason = "open file description locks have no safe wrapper among our dependencies"
)]
fn lock(file: &File, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: `flock` is a C struct of integers, for which all zeroes is a value.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = kind as libc::c_short;
    request.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and `request` lives through the call,
    // which is all that these commands ask of their argument.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &mut request) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(libc::c_int::from(request.l_type))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_ends_though_another_process_has_its_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = StoreLock::take(&path).unwrap();
        assert!(StoreLock::is_held(&path).unwrap());
        let inherited = held.file.try_clone().unwrap();
        drop(held);
        assert!(!StoreLock::is_held(&path).unwrap());
        StoreLock::take(&path).unwrap();
        drop(inherited);
    }
}
