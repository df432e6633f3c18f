//! The handshake: what client and server agree on before the first request.

use std::io::{self, Read, Write};

use super::proto::{
    self, BASE_ALLOCATION, BASE_ALLOCATION_ID, FIXED_NEWSTYLE, Fields, MAGIC, NO_ZEROES, OPTION_MAGIC,
    answer, export_flag, info, option,
};
use super::{Export, REQUEST_BYTES_MAX};

/// Data of one option. The longest that makes sense are two names of 4096 bytes.
const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Options of one handshake.
const OPTIONS_MAX: usize = 128;
/// What clients are asked to read and write in.
const BLOCK_BYTES_PREFERRED: u32 = 4096;

/// What was agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Reads are answered in chunks.
    pub(super) structured: bool,
    /// `base:allocation` may be asked for.
    pub(super) block_status: bool,
}

/// How safe a connection is, and has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Security {
    /// There is no TLS here.
    Plain,
    /// Nothing is told before it is under TLS.
    Required,
    /// It is under TLS.
    Established,
}

/// How a handshake ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shaken {
    /// Requests come next.
    Agreed(Agreed),
    /// TLS comes next, and then the options anew.
    StartTls,
    /// The client has left, or was left, in good order.
    Left,
}

/// Where a handshake stands after an option.
enum Next {
    Option,
    Transmission,
    StartTls,
    End,
}

/// Begins a handshake. Does the client want the zeroes after `EXPORT_NAME`?
pub(super) fn greet<S: Read + Write>(stream: &mut S) -> io::Result<bool> {
    let mut hello = Vec::with_capacity(18);
    hello.extend_from_slice(&MAGIC.to_be_bytes());
    hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    hello.extend_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    stream.write_all(&hello)?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(not_the_protocol("unknown flags"));
    }
    Ok(flags & u32::from(NO_ZEROES) == 0)
}

/// Goes through the client's options.
pub(super) fn agree<S: Read + Write>(
    stream: &mut S,
    export: &Export<'_>,
    zeroes: bool,
    security: Security,
) -> io::Result<Shaken> {
    let mut handshake = Handshake {
        stream,
        export,
        zeroes,
        security,
        agreed: Agreed::default(),
    };
    for _ in 0..OPTIONS_MAX {
        match handshake.next_option()? {
            Next::Option => {}
            Next::Transmission => return Ok(Shaken::Agreed(handshake.agreed)),
            Next::StartTls => return Ok(Shaken::StartTls),
            Next::End => return Ok(Shaken::Left),
        }
    }
    Err(not_the_protocol("too many options"))
}

fn not_the_protocol(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

struct Handshake<'a, S> {
    stream: &'a mut S,
    export: &'a Export<'a>,
    /// The client wants the zeroes after `EXPORT_NAME`.
    zeroes: bool,
    security: Security,
    agreed: Agreed,
}

impl<S: Read + Write> Handshake<'_, S> {
    fn next_option(&mut self) -> io::Result<Next> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        let (number, len) = proto::decode_option(&head).ok_or_else(|| not_the_protocol("not an option"))?;
        if len > OPTION_BYTES_MAX {
            return Err(not_the_protocol("an option that is too long"));
        }
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        if self.security == Security::Required {
            return self.before_tls(number, &data);
        }
        match number {
            option::EXPORT_NAME => return self.export_name(&data),
            option::ABORT => {
                self.reply(number, answer::ACK, &[])?;
                return Ok(Next::End);
            }
            option::LIST => self.list(&data)?,
            option::INFO | option::GO => {
                let is_known = self.info(number, &data)?;
                if is_known && number == option::GO {
                    return Ok(Next::Transmission);
                }
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.agreed.structured = true;
                self.reply(number, answer::ACK, &[])?;
            }
            option::STRUCTURED_REPLY => self.reply(number, answer::ERR_INVALID, b"no data belongs here")?,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(number, &data)?,
            option::STARTTLS if self.security == Security::Established => {
                self.reply(number, answer::ERR_INVALID, b"there is TLS already")?;
            }
            // STARTTLS among them.
            _ => self.reply(number, answer::ERR_UNSUP, b"not offered")?,
        }
        Ok(Next::Option)
    }

    /// An option of a client that may not know yet what there is.
    fn before_tls(&mut self, number: u32, data: &[u8]) -> io::Result<Next> {
        match number {
            option::STARTTLS if data.is_empty() => {
                self.reply(number, answer::ACK, &[])?;
                return Ok(Next::StartTls);
            }
            option::STARTTLS => self.reply(number, answer::ERR_INVALID, b"no data belongs here")?,
            option::ABORT => {
                self.reply(number, answer::ACK, &[])?;
                return Ok(Next::End);
            }
            // The old way has no answer but to leave.
            option::EXPORT_NAME => return Err(not_the_protocol("no TLS")),
            _ => self.reply(number, answer::ERR_TLS_REQD, b"only under TLS")?,
        }
        Ok(Next::Option)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(&proto::option_reply(option, kind, data))
    }

    fn flags(&self) -> u16 {
        let mut flags = export_flag::HAS_FLAGS | export_flag::SEND_FLUSH | export_flag::CAN_MULTI_CONN;
        flags |= if self.export.disk.is_writable() {
            export_flag::SEND_FUA | export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES
        } else {
            export_flag::READ_ONLY
        };
        if self.agreed.structured {
            flags |= export_flag::SEND_DF;
        }
        flags
    }

    /// The old way, which has no answer for a name that is not known but to leave.
    fn export_name(&mut self, name: &[u8]) -> io::Result<Next> {
        if !self.export.is_called(name) {
            return Err(not_the_protocol("another name than the export's"));
        }
        let mut bytes = Vec::with_capacity(10 + 124);
        bytes.extend_from_slice(&self.export.disk.bytes().to_be_bytes());
        bytes.extend_from_slice(&self.flags().to_be_bytes());
        if self.zeroes {
            bytes.resize(10 + 124, 0);
        }
        self.stream.write_all(&bytes)?;
        Ok(Next::Transmission)
    }

    fn list(&mut self, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            return self.reply(option::LIST, answer::ERR_INVALID, b"no data belongs here");
        }
        let name = self.export.name.as_bytes();
        let mut entry = Vec::with_capacity(4 + name.len() + self.export.description.len());
        entry.extend_from_slice(&(name.len() as u32).to_be_bytes());
        entry.extend_from_slice(name);
        entry.extend_from_slice(self.export.description.as_bytes());
        self.reply(option::LIST, answer::SERVER, &entry)?;
        self.reply(option::LIST, answer::ACK, &[])
    }

    /// Answers INFO and GO; says whether the name is the export's.
    fn info(&mut self, number: u32, data: &[u8]) -> io::Result<bool> {
        let mut fields = Fields(data);
        let mut parse = || {
            let name = fields.text()?;
            let count = fields.u16()?;
            let wanted: Option<Vec<u16>> = (0..count).map(|_| fields.u16()).collect();
            fields.0.is_empty().then_some((name, wanted?))
        };
        let Some((name, wanted)) = parse() else {
            self.reply(number, answer::ERR_INVALID, b"a request that makes no sense")?;
            return Ok(false);
        };
        if !self.export.is_called(name) {
            let says = format!("there is only {:?} here", self.export.name);
            self.reply(number, answer::ERR_UNKNOWN, says.as_bytes())?;
            return Ok(false);
        }
        let mut told = vec![info::EXPORT];
        told.extend(
            [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE]
                .iter()
                .filter(|kind| wanted.contains(kind)),
        );
        for kind in told {
            let mut bytes = kind.to_be_bytes().to_vec();
            match kind {
                info::NAME => bytes.extend_from_slice(self.export.name.as_bytes()),
                info::DESCRIPTION => bytes.extend_from_slice(self.export.description.as_bytes()),
                info::BLOCK_SIZE => {
                    for size in [1, BLOCK_BYTES_PREFERRED, REQUEST_BYTES_MAX] {
                        bytes.extend_from_slice(&size.to_be_bytes());
                    }
                }
                _ => {
                    bytes.extend_from_slice(&self.export.disk.bytes().to_be_bytes());
                    bytes.extend_from_slice(&self.flags().to_be_bytes());
                }
            }
            self.reply(number, answer::INFO, &bytes)?;
        }
        self.reply(number, answer::ACK, &[])?;
        Ok(true)
    }

    fn meta_context(&mut self, number: u32, data: &[u8]) -> io::Result<()> {
        let mut fields = Fields(data);
        let mut parse = || {
            let name = fields.text()?;
            let count = fields.u32()?;
            let mut queries = Vec::new();
            // As many as there is data for, whatever the count says.
            for _ in 0..count {
                queries.push(fields.text()?);
            }
            fields.0.is_empty().then_some((name, queries))
        };
        let Some((name, queries)) = parse() else {
            return self.reply(number, answer::ERR_INVALID, b"a request that makes no sense");
        };
        if !self.agreed.structured {
            return self.reply(number, answer::ERR_INVALID, b"structured replies come first");
        }
        if !self.export.is_called(name) {
            return self.reply(number, answer::ERR_UNKNOWN, b"no such export");
        }
        let is_list = number == option::LIST_META_CONTEXT;
        let is_wanted = (is_list && queries.is_empty())
            || queries
                .iter()
                .any(|query| *query == BASE_ALLOCATION.as_bytes() || (is_list && *query == b"base:"));
        if !is_list {
            self.agreed.block_status = is_wanted;
        }
        if is_wanted {
            // A list only names: its numbers mean nothing.
            let id = if is_list { 0 } else { BASE_ALLOCATION_ID };
            let mut bytes = id.to_be_bytes().to_vec();
            bytes.extend_from_slice(BASE_ALLOCATION.as_bytes());
            self.reply(number, answer::META_CONTEXT, &bytes)?;
        }
        self.reply(number, answer::ACK, &[])
    }
}
