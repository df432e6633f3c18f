//! Reads what the probe must know of the running kernel from its BTF: offsets of fields, sizes of
//! structures, values of enumerators.
//!
//! The whole table is walked once (a few milliseconds). Format: the kernel's
//! `Documentation/bpf/btf.rst`. A field that is missing, or a structure name that stands for several
//! different layouts, is an error: a guess would capture the wrong bytes.

use std::collections::HashMap;
use std::path::Path;

use cdp_ebpf::Kernel;

/// Why the running kernel cannot be described.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BtfError {
    #[error("read {path}: this kernel offers no BTF; a kernel built with CONFIG_DEBUG_INFO_BTF is needed")]
    Missing {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("BTF: {0}")]
    Malformed(&'static str),
    #[error("BTF: this kernel has no {0}")]
    NotFound(String),
    #[error("BTF: this kernel has several structures called {0}")]
    Ambiguous(String),
}

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FWD: u32 = 7;
const KIND_TYPEDEF: u32 = 8;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_FLOAT: u32 = 16;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// One type: where it lies in the type section and what its head says.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    kind: u32,
    kind_flag: bool,
    vlen: usize,
    name: u32,
    size_or_type: u32,
}

/// The kernel's types.
pub(crate) struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    by_id: Vec<Type>,
    structs: HashMap<Vec<u8>, Vec<u32>>,
    enumerators: HashMap<Vec<u8>, u64>,
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    let four = bytes
        .get(at..at + 4)
        .ok_or(BtfError::Malformed("a type is cut off"))?;
    Ok(u32::from_le_bytes([four[0], four[1], four[2], four[3]]))
}

impl Btf {
    /// Reads the running kernel's BTF.
    pub(crate) fn of_running_kernel() -> Result<Self, BtfError> {
        let path = Path::new("/sys/kernel/btf/vmlinux");
        let bytes = std::fs::read(path).map_err(|source| BtfError::Missing {
            path: path.display().to_string(),
            source,
        })?;
        Self::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> Result<Self, BtfError> {
        if bytes.get(..2) != Some(&[0x9f, 0xeb]) {
            return Err(BtfError::Malformed("no little-endian BTF header"));
        }
        let header_bytes = u32_at(bytes, 4)? as usize;
        let section = |offset_at: usize| -> Result<Vec<u8>, BtfError> {
            let (offset, length) = (
                u32_at(bytes, offset_at)? as usize,
                u32_at(bytes, offset_at + 4)? as usize,
            );
            let start = header_bytes + offset;
            bytes
                .get(start..start + length)
                .map(<[u8]>::to_vec)
                .ok_or(BtfError::Malformed("a section is cut off"))
        };
        let mut btf = Self {
            types: section(8)?,
            strings: section(16)?,
            by_id: Vec::with_capacity(1 << 17),
            structs: HashMap::new(),
            enumerators: HashMap::new(),
        };
        btf.walk()?;
        Ok(btf)
    }

    fn walk(&mut self) -> Result<(), BtfError> {
        // Type 0 is void and has no entry.
        self.by_id.push(Type {
            at: 0,
            kind: 0,
            kind_flag: false,
            vlen: 0,
            name: 0,
            size_or_type: 0,
        });
        let mut at = 0;
        while at < self.types.len() {
            let info = u32_at(&self.types, at + 4)?;
            let ty = Type {
                at: at + 12,
                kind: (info >> 24) & 0x1f,
                kind_flag: info >> 31 != 0,
                vlen: (info & 0xffff) as usize,
                name: u32_at(&self.types, at)?,
                size_or_type: u32_at(&self.types, at + 8)?,
            };
            let payload = match ty.kind {
                KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                KIND_ARRAY => 12,
                KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12 * ty.vlen,
                KIND_ENUM | KIND_FUNC_PROTO => 8 * ty.vlen,
                KIND_PTR
                | KIND_FWD
                | KIND_TYPEDEF..=KIND_RESTRICT
                | KIND_FUNC
                | KIND_FLOAT
                | KIND_TYPE_TAG => 0,
                _ => {
                    return Err(BtfError::Malformed(
                        "a kind of type that this build does not know",
                    ));
                }
            };
            match ty.kind {
                KIND_STRUCT if ty.name != 0 => {
                    let id = self.by_id.len() as u32;
                    self.structs
                        .entry(self.string(ty.name).to_vec())
                        .or_default()
                        .push(id);
                }
                KIND_ENUM => {
                    for i in 0..ty.vlen {
                        let name = self.string(u32_at(&self.types, ty.at + 8 * i)?).to_vec();
                        let value = u64::from(u32_at(&self.types, ty.at + 8 * i + 4)?);
                        self.enumerators.entry(name).or_insert(value);
                    }
                }
                _ => {}
            }
            self.by_id.push(ty);
            at = ty.at + payload;
        }
        Ok(())
    }

    fn string(&self, offset: u32) -> &[u8] {
        let rest = self.strings.get(offset as usize..).unwrap_or_default();
        &rest[..rest.iter().position(|&b| b == 0).unwrap_or(rest.len())]
    }

    fn structure(&self, name: &str) -> Result<Type, BtfError> {
        match self.structs.get(name.as_bytes()).map(Vec::as_slice) {
            Some([id]) => Ok(self.by_id[*id as usize]),
            Some(_) => Err(BtfError::Ambiguous(name.to_owned())),
            None => Err(BtfError::NotFound(format!("struct {name}"))),
        }
    }

    /// `sizeof(struct name)`.
    pub(crate) fn size_of(&self, name: &str) -> Result<u32, BtfError> {
        Ok(self.structure(name)?.size_or_type)
    }

    /// Byte offset of a field; `path` may lead through nested structures (`bi_iter.bi_size`).
    pub(crate) fn offset_of(&self, structure: &str, path: &str) -> Result<u32, BtfError> {
        let mut ty = self.structure(structure)?;
        let mut offset = 0;
        for (i, field) in path.split('.').enumerate() {
            if i > 0 && ty.kind != KIND_STRUCT && ty.kind != KIND_UNION {
                return Err(BtfError::NotFound(format!("{structure}.{path}")));
            }
            let (at, member) = self
                .member(ty, field.as_bytes())?
                .ok_or_else(|| BtfError::NotFound(format!("{structure}.{path}")))?;
            offset += at;
            ty = self.resolve(member)?;
        }
        Ok(offset)
    }

    /// Offset and type of a member, also inside anonymous members.
    fn member(&self, ty: Type, name: &[u8]) -> Result<Option<(u32, u32)>, BtfError> {
        for i in 0..ty.vlen {
            let at = ty.at + 12 * i;
            let member_name = u32_at(&self.types, at)?;
            let member_type = u32_at(&self.types, at + 4)?;
            let raw = u32_at(&self.types, at + 8)?;
            let bits = if ty.kind_flag { raw & 0x00ff_ffff } else { raw };
            if member_name != 0 {
                if self.string(member_name) == name {
                    return Ok(Some((bits / 8, member_type)));
                }
                continue;
            }
            let inner = self.resolve(member_type)?;
            if (inner.kind == KIND_STRUCT || inner.kind == KIND_UNION)
                && let Some((inside, found)) = self.member(inner, name)?
            {
                return Ok(Some((bits / 8 + inside, found)));
            }
        }
        Ok(None)
    }

    /// Follows typedefs and qualifiers.
    fn resolve(&self, mut id: u32) -> Result<Type, BtfError> {
        for _ in 0..32 {
            let ty = *self
                .by_id
                .get(id as usize)
                .ok_or(BtfError::Malformed("a reference leads nowhere"))?;
            match ty.kind {
                KIND_TYPEDEF..=KIND_RESTRICT | KIND_TYPE_TAG => id = ty.size_or_type,
                _ => return Ok(ty),
            }
        }
        Err(BtfError::Malformed("a chain of typedefs has no end"))
    }

    fn enumerator(&self, name: &str) -> Result<u32, BtfError> {
        let value = self.enumerators.get(name.as_bytes());
        value
            .map(|&v| v as u32)
            .ok_or_else(|| BtfError::NotFound(format!("enumerator {name}")))
    }

    /// All that the probe must know, but for the place of the direct map and the ring's size.
    pub(crate) fn kernel(&self) -> Result<Kernel, BtfError> {
        let bit = |name: &str| self.enumerator(name).map(|shift| 1 << shift);
        Ok(Kernel {
            bio_next: self.offset_of("bio", "bi_next")?,
            bio_bdev: self.offset_of("bio", "bi_bdev")?,
            bio_opf: self.offset_of("bio", "bi_opf")?,
            bio_status: self.offset_of("bio", "bi_status")?,
            bio_sector: self.offset_of("bio", "bi_iter.bi_sector")?,
            bio_size: self.offset_of("bio", "bi_iter.bi_size")?,
            bio_idx: self.offset_of("bio", "bi_iter.bi_idx")?,
            bio_bvec_done: self.offset_of("bio", "bi_iter.bi_bvec_done")?,
            bio_io_vec: self.offset_of("bio", "bi_io_vec")?,
            bio_flags: self.offset_of("bio", "bi_flags")?,
            bio_vcnt: self.offset_of("bio", "bi_vcnt")?,
            // Since 6.3; without it, the pages of direct I/O are looked at as well.
            bio_pinned: bit("BIO_PAGE_PINNED").unwrap_or(0),
            bvec_bytes: self.size_of("bio_vec")?,
            bvec_page: self.offset_of("bio_vec", "bv_page")?,
            bvec_len: self.offset_of("bio_vec", "bv_len")?,
            bvec_offset: self.offset_of("bio_vec", "bv_offset")?,
            bdev_disk: self.offset_of("block_device", "bd_disk")?,
            bdev_dev: self.offset_of("block_device", "bd_dev")?,
            disk_part0: self.offset_of("gendisk", "part0")?,
            rq_bio: self.offset_of("request", "bio")?,
            rq_sector: self.offset_of("request", "__sector")?,
            rq_cmd_flags: self.offset_of("request", "cmd_flags")?,
            bh_page: self
                .offset_of("buffer_head", "b_folio")
                .or_else(|_| self.offset_of("buffer_head", "b_page"))?,
            bh_data: self.offset_of("buffer_head", "b_data")?,
            bh_bdev: self.offset_of("buffer_head", "b_bdev")?,
            op_write: self.enumerator("REQ_OP_WRITE")?,
            op_flush: self.enumerator("REQ_OP_FLUSH")?,
            op_discard: self.enumerator("REQ_OP_DISCARD")?,
            op_secure_erase: self.enumerator("REQ_OP_SECURE_ERASE")?,
            op_write_zeroes: self.enumerator("REQ_OP_WRITE_ZEROES")?,
            flag_preflush: bit("__REQ_PREFLUSH")?,
            flag_fua: bit("__REQ_FUA")?,
            flag_sync: bit("__REQ_SYNC")?,
            flag_meta: bit("__REQ_META")?,
            page_flags: self.offset_of("page", "flags")?,
            page_compound_head: self.offset_of("page", "compound_head")?,
            page_writeback: bit("PG_writeback")?,
            page_changing: bit("PG_dirty")? | bit("PG_locked")?,
            page_struct_bytes: self.size_of("page")?,
            page_shift: rustix::param::page_size().trailing_zeros(),
            ..Kernel::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A BTF blob by hand: `struct outer { int a; struct { int b; }; }` with a bit-field layout.
    fn blob() -> Vec<u8> {
        let mut strings = vec![0];
        let mut string = |s: &str| {
            let at = strings.len() as u32;
            strings.extend_from_slice(s.as_bytes());
            strings.push(0);
            at
        };
        let (int, outer, a, b, op) = (
            string("int"),
            string("outer"),
            string("a"),
            string("b"),
            string("REQ_OP_X"),
        );
        let mut types: Vec<u32> = Vec::new();
        types.extend([int, KIND_INT << 24, 4, 32]); // 1
        types.extend([0, (KIND_STRUCT << 24) | 1, 4, b, 1, 0]); // 2, anonymous
        types.extend([
            outer,
            (1 << 31) | (KIND_STRUCT << 24) | 2,
            8,
            a,
            1,
            (7 << 24),
            0,
            2,
            32,
        ]); // 3
        types.extend([0, (KIND_ENUM << 24) | 1, 4, op, 9]); // 4
        types.extend([0, (KIND_ENUM64 << 24) | 1, 8, op, 1, 0]); // 5
        types.extend([a, KIND_DECL_TAG << 24, 1, 0, a, KIND_TYPE_TAG << 24, 1]); // 6, 7
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [
            24,
            0,
            types.len() as u32,
            types.len() as u32,
            strings.len() as u32,
        ] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(types);
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn fields_are_found_through_anonymous_members_and_flagged_offsets() {
        let btf = Btf::parse(&blob()).unwrap();
        assert_eq!(btf.offset_of("outer", "a").unwrap(), 0);
        assert_eq!(btf.offset_of("outer", "b").unwrap(), 4);
        assert_eq!(btf.size_of("outer").unwrap(), 8);
        assert_eq!(btf.enumerator("REQ_OP_X").unwrap(), 9);
    }

    #[test]
    fn what_is_missing_or_cut_off_is_an_error() {
        let btf = Btf::parse(&blob()).unwrap();
        assert!(matches!(btf.offset_of("outer", "c"), Err(BtfError::NotFound(_))));
        assert!(matches!(btf.offset_of("inner", "c"), Err(BtfError::NotFound(_))));
        let whole = blob();
        for length in 0..whole.len() - 1 {
            assert!(Btf::parse(&whole[..length]).is_err(), "cut to {length} bytes");
        }
    }
}
