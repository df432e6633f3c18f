//! What the probe must know of the running kernel, set as one global before it is loaded.

/// Offsets (bytes) of fields, codes of operations and the place of the direct map, all read from the
/// running kernel by the agent. The verifier sees them as constants.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// `bio.bi_next`
    pub bio_next: u32,
    /// `bio.bi_bdev`
    pub bio_bdev: u32,
    /// `bio.bi_opf`
    pub bio_opf: u32,
    /// `bio.bi_status`
    pub bio_status: u32,
    /// `bio.bi_iter.bi_sector`
    pub bio_sector: u32,
    /// `bio.bi_iter.bi_size`
    pub bio_size: u32,
    /// `bio.bi_iter.bi_idx`
    pub bio_idx: u32,
    /// `bio.bi_iter.bi_bvec_done`
    pub bio_bvec_done: u32,
    /// `bio.bi_io_vec`
    pub bio_io_vec: u32,
    /// `bio.bi_flags`
    pub bio_flags: u32,
    /// `bio.bi_vcnt`
    pub bio_vcnt: u32,
    /// `1 << BIO_PAGE_PINNED`: pages of a user's own buffer. 0 on kernels that do not say.
    pub bio_pinned: u32,
    /// `sizeof(struct bio_vec)`
    pub bvec_bytes: u32,
    /// `bio_vec.bv_page`
    pub bvec_page: u32,
    /// `bio_vec.bv_len`
    pub bvec_len: u32,
    /// `bio_vec.bv_offset`
    pub bvec_offset: u32,
    /// `block_device.bd_disk`
    pub bdev_disk: u32,
    /// `block_device.bd_dev`
    pub bdev_dev: u32,
    /// `gendisk.part0`
    pub disk_part0: u32,
    /// `request.bio`
    pub rq_bio: u32,
    /// `request.__sector`
    pub rq_sector: u32,
    /// `request.cmd_flags`
    pub rq_cmd_flags: u32,
    /// `buffer_head.b_folio`, before it had folios `b_page`
    pub bh_page: u32,
    /// `buffer_head.b_data`
    pub bh_data: u32,
    /// `buffer_head.b_bdev`
    pub bh_bdev: u32,
    /// `REQ_OP_WRITE`
    pub op_write: u32,
    /// `REQ_OP_FLUSH`
    pub op_flush: u32,
    /// `REQ_OP_DISCARD`
    pub op_discard: u32,
    /// `REQ_OP_SECURE_ERASE`
    pub op_secure_erase: u32,
    /// `REQ_OP_WRITE_ZEROES`
    pub op_write_zeroes: u32,
    /// `1 << __REQ_PREFLUSH`
    pub flag_preflush: u32,
    /// `1 << __REQ_FUA`
    pub flag_fua: u32,
    /// `1 << __REQ_SYNC`
    pub flag_sync: u32,
    /// `1 << __REQ_META`
    pub flag_meta: u32,
    /// `page.flags`
    pub page_flags: u32,
    /// `page.compound_head`
    pub page_compound_head: u32,
    /// `1 << PG_writeback`
    pub page_writeback: u32,
    /// `1 << PG_dirty | 1 << PG_locked`: while a page is written back, somebody changes it.
    pub page_changing: u32,
    /// `sizeof(struct page)`
    pub page_struct_bytes: u32,
    /// log2 of the page size
    pub page_shift: u32,
    /// Set when only the disk in `calibrate_disk` is to be looked at, by the calibration program.
    pub calibrate_disk: u32,
    /// Always 0; keeps what follows aligned without padding.
    pub reserved: u32,
    /// Address of some `struct page` …
    pub page_address: u64,
    /// … and of that page's bytes in the direct map.
    pub page_bytes_address: u64,
    /// Capacity of the ring.
    pub ring_bytes: u64,
}
