//! The SHA-256 of a view: read by several threads, digested in order.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use cdp_journal::ReadError;
use cdp_journal::view::View;
use sha2::{Digest, Sha256};

use crate::report::Progress;

/// What one read fetches.
const PIECE_BYTES: u64 = 4 << 20;

/// Pieces that a thread may be ahead of the digest: with 64 threads that is 768 MiB at most.
const PIECES_AHEAD: usize = 2;

/// The digest of the whole view as hexadecimal digits.
pub(crate) fn sha256(view: &View, threads: usize, progress: &Progress) -> Result<String, ReadError> {
    let mut digest = Sha256::new();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads as u64)
            .map(|first| {
                let (sender, receiver) = sync_channel(PIECES_AHEAD);
                scope.spawn(move || read_every(view, first, threads as u64, &sender));
                receiver
            })
            .collect();
        digest_in_turn(&readers, &mut digest, progress)
    })?;
    Ok(digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Sends the pieces numbered `first`, `first + step`, …; stops when nobody listens any more.
fn read_every(view: &View, first: u64, step: u64, sender: &SyncSender<Result<Vec<u8>, ReadError>>) {
    let pieces = view.bytes().div_ceil(PIECE_BYTES);
    let mut piece = first;
    while piece < pieces {
        let offset = piece * PIECE_BYTES;
        let mut data = vec![0; PIECE_BYTES.min(view.bytes() - offset) as usize];
        let read = view.read_at(offset, &mut data).map(|()| data);
        if sender.send(read).is_err() {
            return;
        }
        piece += step;
    }
}

/// Piece n comes from reader n modulo their number; the first that has no more is past the end.
fn digest_in_turn(
    readers: &[Receiver<Result<Vec<u8>, ReadError>>],
    digest: &mut Sha256,
    progress: &Progress,
) -> Result<(), ReadError> {
    for reader in readers.iter().cycle() {
        let Ok(read) = reader.recv() else { return Ok(()) };
        let data = read?;
        digest.update(&data);
        progress.advance(data.len() as u64);
    }
    Ok(())
}
