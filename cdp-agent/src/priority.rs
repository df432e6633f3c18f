//! What our threads are to the scheduler: work that may wait a little, so that it never cuts in on production.
#![expect(
    unsafe_code,
    reason = "sched_setscheduler(2) and ioprio_set(2) have no safe wrapper here"
)]

/// `IOPRIO_CLASS_IDLE` (uapi/linux/ioprio.h): served when nobody else wants the disk.
const IOPRIO_IDLE: libc::c_long = 3 << 13;
const IOPRIO_WHO_PROCESS: libc::c_long = 1;

/// This thread wakes up without pushing the running one aside (SCHED_BATCH); its share stays the same.
pub(crate) fn do_not_preempt() {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: a valid parameter for the calling thread. A refusal leaves things as they were.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const param) };
    if result != 0 {
        tracing::debug!("SCHED_BATCH: {}", std::io::Error::last_os_error());
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
