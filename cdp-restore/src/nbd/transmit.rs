//! The transmission phase: requests of one connection, several at once, answered as they are done.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use cdp_journal::view::ExtentKind;
use parking_lot::Mutex;
use rustix::io::Errno;

use super::handshake::Agreed;
use super::proto::{
    BASE_ALLOCATION_ID, CHUNK_HEAD_BYTES, Request, STATE_HOLE_ZERO, chunk, chunk_head, command, command_flag,
    simple_reply,
};
use super::{Export, PIECE_BYTES, REQUEST_BYTES_MAX, WORKERS};
use crate::disk::DiskError;

/// Entries of one answer about block status, and how much of the disk it looks at a time.
const STATUS_ENTRIES_MAX: usize = 4096;
const STATUS_STEP_BYTES: u64 = 64 << 20;
/// Shorter reads are not searched for holes.
const HOLE_BYTES_MIN: u32 = 64 << 10;
/// A chunk's head and the offset of its data.
const DATA_HEAD_BYTES: usize = CHUNK_HEAD_BYTES + 8;
/// The protocol knows these, by Linux' numbers; every other failure is `EIO`.
const TOLD: [Errno; 4] = [Errno::PERM, Errno::INVAL, Errno::NOSPC, Errno::OVERFLOW];
/// Longest message in an error chunk.
const MESSAGE_BYTES_MAX: usize = 1024;

/// One connection after its handshake.
pub(super) struct Connection<'a, R, W> {
    export: &'a Export<'a>,
    agreed: Agreed,
    reader: Mutex<R>,
    writer: Mutex<W>,
    ended: AtomicBool,
}

/// Why a request is answered with an error.
struct Refusal {
    errno: Errno,
    why: String,
}

impl Refusal {
    fn new(errno: Errno, why: &str) -> Self {
        Refusal {
            errno,
            why: why.to_owned(),
        }
    }
}

/// Why no more can be said to a client.
enum Stop {
    /// The connection has failed.
    Io(io::Error),
    /// The request has failed.
    Refused(Refusal),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Stop::Io(error)
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Stop::Refused(refusal)
    }
}

impl<'a, R: Read + Send, W: Write + Send> Connection<'a, R, W> {
    pub(super) fn new(export: &'a Export<'a>, agreed: Agreed, reader: R, writer: W) -> Self {
        Connection {
            export,
            agreed,
            reader: Mutex::new(reader),
            writer: Mutex::new(writer),
            ended: AtomicBool::new(false),
        }
    }

    /// Serves until the client leaves, the connection breaks, or what comes is not the protocol.
    pub(super) fn serve(&self) {
        thread::scope(|scope| {
            for _ in 1..WORKERS {
                // Without a thread, the others do its work.
                let _ = thread::Builder::new()
                    .name("nbd".to_owned())
                    .spawn_scoped(scope, || self.work());
            }
            self.work();
        });
    }

    fn work(&self) {
        let mut piece = Vec::new();
        while !self.ended.load(Ordering::SeqCst) {
            if self.one_request(&mut piece).is_err() {
                self.ended.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Takes one request and answers it; an error ends the connection.
    fn one_request(&self, piece: &mut Vec<u8>) -> io::Result<()> {
        let mut reader = self.reader.lock();
        if self.ended.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut head = [0; Request::BYTES];
        reader.read_exact(&mut head)?;
        let request = Request::decode(&head).ok_or(io::ErrorKind::InvalidData)?;
        if request.command == command::DISCONNECT {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let mut taken = Ok(());
        if request.command == command::WRITE {
            taken = self.take_write(&mut *reader, &request, piece)?;
        }
        drop(reader);
        let done = taken
            .map_err(Stop::from)
            .and_then(|()| self.answer(&request, piece));
        match done {
            Ok(()) => Ok(()),
            Err(Stop::Io(error)) => Err(error),
            Err(Stop::Refused(refusal)) => self.send_refusal(&request, &refusal),
        }
    }

    /// Takes the data of a write off the connection, all of it whatever becomes of it. What fits in one piece is left
    /// in `piece` for [`Self::answer`]; more is written piece by piece as it comes.
    fn take_write(
        &self,
        reader: &mut impl Read,
        request: &Request,
        piece: &mut Vec<u8>,
    ) -> io::Result<Result<(), Refusal>> {
        piece.resize(PIECE_BYTES, 0);
        let mut done = self.check(request);
        let (mut at, mut left) = (request.offset, u64::from(request.len));
        if left <= PIECE_BYTES as u64 {
            reader.read_exact(&mut piece[..left as usize])?;
            return Ok(done);
        }
        while left > 0 {
            let bytes = &mut piece[..left.min(PIECE_BYTES as u64) as usize];
            reader.read_exact(bytes)?;
            if done.is_ok() {
                done = self
                    .export
                    .disk
                    .write_at(at, bytes)
                    .map_err(|error| self.refuse(&error));
            }
            left -= bytes.len() as u64;
            at = at.saturating_add(bytes.len() as u64);
        }
        Ok(done)
    }

    fn answer(&self, request: &Request, piece: &mut Vec<u8>) -> Result<(), Stop> {
        let disk = &self.export.disk;
        let (offset, len) = (request.offset, u64::from(request.len));
        self.check(request)?;
        match request.command {
            command::READ if self.agreed.structured => return self.read_structured(request, piece),
            command::READ => return self.read_simple(request, piece),
            command::BLOCK_STATUS => return self.block_status(request),
            command::WRITE if len <= PIECE_BYTES as u64 => disk
                .write_at(offset, &piece[..len as usize])
                .map_err(|error| self.refuse(&error))?,
            command::TRIM | command::WRITE_ZEROES => {
                disk.zero(offset, len).map_err(|error| self.refuse(&error))?;
            }
            // A longer write is done. There is nothing to flush: what was written lasts as long as this process, and
            // every connection sees it.
            _ => {}
        }
        self.send(&simple_reply(request.cookie, 0))?;
        Ok(())
    }

    /// Refuses what cannot be meant, before anything is done.
    fn check(&self, request: &Request) -> Result<(), Refusal> {
        let disk = &self.export.disk;
        let allowed = match request.command {
            command::READ if self.agreed.structured => command_flag::DF | command_flag::FUA,
            command::READ | command::FLUSH => command_flag::FUA,
            command::WRITE | command::TRIM => command_flag::FUA,
            command::WRITE_ZEROES => command_flag::FUA | command_flag::NO_HOLE,
            command::BLOCK_STATUS if self.agreed.block_status => command_flag::REQ_ONE | command_flag::FUA,
            command::BLOCK_STATUS => {
                return Err(Refusal::new(Errno::INVAL, "no context was agreed on"));
            }
            _ => return Err(Refusal::new(Errno::INVAL, "an unknown command")),
        };
        if request.flags & !allowed != 0 {
            return Err(Refusal::new(
                Errno::INVAL,
                "a flag that does not belong to the command",
            ));
        }
        if request.command == command::FLUSH {
            return match (request.offset, request.len) {
                (0, 0) => Ok(()),
                _ => Err(Refusal::new(Errno::INVAL, "a flush has no range")),
            };
        }
        let changes = matches!(
            request.command,
            command::WRITE | command::TRIM | command::WRITE_ZEROES
        );
        if changes && !disk.is_writable() {
            return Err(Refusal::new(Errno::PERM, "the export is read-only"));
        }
        if request.len == 0 {
            return Err(Refusal::new(Errno::INVAL, "a range of no bytes"));
        }
        let end = request.offset.checked_add(request.len.into());
        if end.is_none_or(|end| end > disk.bytes()) {
            let errno = if request.command == command::WRITE || request.command == command::WRITE_ZEROES {
                Errno::NOSPC
            } else {
                Errno::INVAL
            };
            return Err(Refusal::new(errno, "beyond the end of the export"));
        }
        if matches!(request.command, command::READ | command::WRITE) && request.len > REQUEST_BYTES_MAX {
            return Err(Refusal::new(Errno::OVERFLOW, "more than 32 MiB in one request"));
        }
        Ok(())
    }

    /// Says on our side what went wrong, and what the client is told.
    fn refuse(&self, error: &DiskError) -> Refusal {
        self.export.complain(error);
        Refusal {
            errno: error.errno(),
            why: error.to_string(),
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.writer.lock().write_all(bytes)
    }

    fn send_refusal(&self, request: &Request, refusal: &Refusal) -> io::Result<()> {
        let errno = if TOLD.contains(&refusal.errno) {
            refusal.errno
        } else {
            Errno::IO
        };
        let errno = errno.raw_os_error().unsigned_abs();
        let is_structured =
            self.agreed.structured && matches!(request.command, command::READ | command::BLOCK_STATUS);
        if !is_structured {
            return self.send(&simple_reply(request.cookie, errno));
        }
        let end = refusal.why.floor_char_boundary(MESSAGE_BYTES_MAX);
        let message = &refusal.why.as_bytes()[..end];
        let len = 6 + message.len() as u32;
        let mut bytes = chunk_head(request.cookie, chunk::DONE, chunk::ERROR, len).to_vec();
        bytes.extend_from_slice(&errno.to_be_bytes());
        bytes.extend_from_slice(&(message.len() as u16).to_be_bytes());
        bytes.extend_from_slice(message);
        self.send(&bytes)
    }

    /// All in one piece, for an error can only be told before the data.
    fn read_simple(&self, request: &Request, piece: &mut Vec<u8>) -> Result<(), Stop> {
        let head = simple_reply(request.cookie, 0);
        self.read_whole(request, piece, &head)
    }

    /// Reads everything behind `head`, and sends both.
    fn read_whole(&self, request: &Request, piece: &mut Vec<u8>, head: &[u8]) -> Result<(), Stop> {
        if request.len as usize > PIECE_BYTES {
            return self.read_twice(request, piece, head);
        }
        let bytes = head.len() + request.len as usize;
        piece.resize(bytes.max(piece.len()), 0);
        piece[..head.len()].copy_from_slice(head);
        self.read(request.offset, &mut piece[head.len()..bytes])?;
        self.send(&piece[..bytes])?;
        Ok(())
    }

    /// The same for what does not fit in one piece: all of it is read and checked before anything is sent, and read
    /// again for that.
    fn read_twice(&self, request: &Request, piece: &mut Vec<u8>, head: &[u8]) -> Result<(), Stop> {
        piece.resize(PIECE_BYTES.max(piece.len()), 0);
        let end = request.offset + u64::from(request.len);
        let pieces = || {
            let starts = (request.offset..end).step_by(PIECE_BYTES);
            starts.map(|at| (at, (end - at).min(PIECE_BYTES as u64) as usize))
        };
        for (at, len) in pieces() {
            self.read(at, &mut piece[..len])?;
        }
        let mut writer = self.writer.lock();
        writer.write_all(head)?;
        for (at, len) in pieces() {
            // What was good a moment ago: the client can only be left.
            let read = self.read(at, &mut piece[..len]);
            read.map_err(|_| Stop::Io(io::ErrorKind::InvalidData.into()))?;
            writer.write_all(&piece[..len])?;
        }
        Ok(())
    }

    fn read(&self, offset: u64, target: &mut [u8]) -> Result<(), Refusal> {
        let read = self.export.disk.read_at(offset, target);
        read.map_err(|error| self.refuse(&error))
    }

    fn read_structured(&self, request: &Request, piece: &mut Vec<u8>) -> Result<(), Stop> {
        if request.has(command_flag::DF) || request.len < HOLE_BYTES_MIN {
            let mut head =
                chunk_head(request.cookie, chunk::DONE, chunk::OFFSET_DATA, request.len + 8).to_vec();
            head.extend_from_slice(&request.offset.to_be_bytes());
            return self.read_whole(request, piece, &head);
        }
        let (mut at, end) = (request.offset, request.offset + u64::from(request.len));
        let last = |at: u64| if at == end { chunk::DONE } else { 0 };
        while at < end {
            let step_end = end.min(at + PIECE_BYTES as u64);
            let extents = self.export.disk.extents(at..step_end);
            for extent in extents.map_err(|error| self.refuse(&error))? {
                at += extent.len;
                if extent.kind == ExtentKind::Zero {
                    let mut bytes = chunk_head(request.cookie, last(at), chunk::OFFSET_HOLE, 12).to_vec();
                    bytes.extend_from_slice(&extent.offset.to_be_bytes());
                    bytes.extend_from_slice(&(extent.len as u32).to_be_bytes());
                    self.send(&bytes)?;
                    continue;
                }
                let len = extent.len as u32 + 8;
                let total = DATA_HEAD_BYTES + extent.len as usize;
                piece.resize(total.max(piece.len()), 0);
                let head = chunk_head(request.cookie, last(at), chunk::OFFSET_DATA, len);
                piece[..CHUNK_HEAD_BYTES].copy_from_slice(&head);
                piece[CHUNK_HEAD_BYTES..DATA_HEAD_BYTES].copy_from_slice(&extent.offset.to_be_bytes());
                self.read(extent.offset, &mut piece[DATA_HEAD_BYTES..total])?;
                self.send(&piece[..total])?;
            }
        }
        Ok(())
    }

    /// Tells of as much of the range as fits in one answer, which may be less than was asked for.
    fn block_status(&self, request: &Request) -> Result<(), Stop> {
        let (mut at, end) = (request.offset, request.offset + u64::from(request.len));
        let entries_max = if request.has(command_flag::REQ_ONE) {
            1
        } else {
            STATUS_ENTRIES_MAX
        };
        let mut entries: Vec<(u32, u32)> = Vec::new();
        'steps: while at < end {
            let step_end = end.min(at + STATUS_STEP_BYTES);
            let extents = self.export.disk.extents(at..step_end);
            for extent in extents.map_err(|error| self.refuse(&error))? {
                let flags = match extent.kind {
                    ExtentKind::Zero => STATE_HOLE_ZERO,
                    ExtentKind::Data => 0,
                };
                let count = entries.len();
                match entries.last_mut() {
                    Some((len, last)) if *last == flags => *len += extent.len as u32,
                    _ if count == entries_max => break 'steps,
                    _ => entries.push((extent.len as u32, flags)),
                }
            }
            at = step_end;
        }
        let len = 4 + 8 * entries.len() as u32;
        let mut bytes = chunk_head(request.cookie, chunk::DONE, chunk::BLOCK_STATUS, len).to_vec();
        bytes.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
        for (len, flags) in entries {
            bytes.extend_from_slice(&len.to_be_bytes());
            bytes.extend_from_slice(&flags.to_be_bytes());
        }
        self.send(&bytes)?;
        Ok(())
    }
}
