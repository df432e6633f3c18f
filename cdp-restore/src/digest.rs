//! The SHA-256 of a view or of a device: read by several threads, digested in order.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use sha2::{Digest, Sha256};

use crate::report::Progress;

/// What one read fetches.
const PIECE_BYTES: u64 = 4 << 20;

/// Pieces that a thread may be ahead of the digest: with 64 threads that is 768 MiB at most.
const PIECES_AHEAD: usize = 2;

/// Fills a buffer with the bytes at an offset.
pub(crate) type ReadAt<'a, E> = &'a (dyn Fn(u64, &mut [u8]) -> Result<(), E> + Sync);

/// The digest of the first `bytes`, as hexadecimal digits.
pub(crate) fn sha256<E: Send>(
    bytes: u64,
    read_at: ReadAt<'_, E>,
    threads: usize,
    progress: &Progress,
) -> Result<String, E> {
    let mut digest = Sha256::new();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads as u64)
            .map(|first| {
                let (sender, receiver) = sync_channel(PIECES_AHEAD);
                scope.spawn(move || {
                    read_every(
                        bytes,
                        read_at,
                        first..bytes.div_ceil(PIECE_BYTES),
                        threads,
                        &sender,
                    )
                });
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

/// Sends every `step`th of the pieces with these numbers; stops when nobody listens any more.
fn read_every<E>(
    bytes: u64,
    read_at: ReadAt<'_, E>,
    pieces: Range<u64>,
    step: usize,
    sender: &SyncSender<Result<Vec<u8>, E>>,
) {
    for piece in pieces.step_by(step) {
        let offset = piece * PIECE_BYTES;
        let mut data = vec![0; PIECE_BYTES.min(bytes - offset) as usize];
        let read = read_at(offset, &mut data).map(|()| data);
        if sender.send(read).is_err() {
            return;
        }
    }
}

/// Piece n comes from reader n modulo their number; the first that has no more is past the end.
fn digest_in_turn<E>(
    readers: &[Receiver<Result<Vec<u8>, E>>],
    digest: &mut Sha256,
    progress: &Progress,
) -> Result<(), E> {
    for reader in readers.iter().cycle() {
        let Ok(read) = reader.recv() else { return Ok(()) };
        let data = read?;
        digest.update(&data);
        progress.advance(data.len() as u64);
    }
    Ok(())
}
