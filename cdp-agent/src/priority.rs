//! What our threads are to the scheduler: work that may wait a little, so that it never cuts in on production.
#![expect(
    unsafe_code,
    reason = "sched_setattr(2) and ioprio_set(2) have no safe wrapper here"
)]

use std::time::Duration;

/// `IOPRIO_CLASS_IDLE` (uapi/linux/ioprio.h): served when nobody else wants the disk.
const IOPRIO_IDLE: libc::c_long = 3 << 13;
const IOPRIO_WHO_PROCESS: libc::c_long = 1;

/// The longest that the kernel takes. It knows them since 6.12 and before that takes no notice.
const SLICE: Duration = Duration::from_millis(100);

/// This thread wakes up without pushing the running one aside (`SCHED_BATCH`), and gives way at once to one that wakes up
/// with a shorter slice, as all do that ask for none (`PREEMPT_SHORT` of the scheduler). Its share stays the same: what it
/// did not get it gets later, in longer turns.
pub(crate) fn give_way() {
    // SAFETY: plain numbers, for the calling thread. It has no error that is possible here.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attr = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_BATCH.cast_unsigned(),
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: SLICE.as_nanos() as u64,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: it is as long as it says, for the calling thread. A refusal leaves things as they were.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if result != 0 {
        tracing::debug!("sched_setattr: {}", std::io::Error::last_os_error());
    }
}

/// This thread's reads give way to everybody else's, where the disk's scheduler knows priorities.
pub(crate) fn read_when_idle() {
    // SAFETY: plain numbers, for the calling thread.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE) };
    if result != 0 {
        tracing::debug!("ioprio_set: {}", std::io::Error::last_os_error());
    }
}
