//! What is shipped arrives once, whole and in order, whatever is cut in between.

use super::*;
use crate::net::TargetState;
use crate::ship::{Rate, Schedule};

#[test]
fn what_is_shipped_is_the_same_log() {
    let mut kit = Kit::new();
    kit.source.write(50, 1);
    let shipper = kit.ship();
    kit.source.write(50, 2);
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    kit.assert_same();
    let status = shipper.status();
    assert_eq!(status.state, TargetState::Connected);
    assert_eq!(status.acked_seq, kit.source.last().unwrap().get());
    assert_eq!((status.backlog_bytes, status.lag_seconds), (0, 0.0));
    assert!(status.sent_bytes > 0);
}

/// Goal: no duplicate, no hole, nothing acknowledged lost. Method: rounds in which either end is ended without a word
/// while frames are on their way; the two logs are compared frame by frame.
#[test]
fn either_end_may_be_killed_at_any_time() {
    let mut kit = Kit::new();
    let mut shipper = Some(kit.ship());
    for round in 0..12 {
        kit.source.write(5 + round % 7, round);
        match round % 3 {
            0 => kit.server.take().unwrap().kill(),
            1 => drop(shipper.take()),
            _ => {
                kit.server.take().unwrap().kill();
                drop(shipper.take());
            }
        }
        kit.source.write(3, round + 100);
        if kit.server.is_none() {
            kit.restart();
        }
        let ship = shipper.get_or_insert_with(|| kit.ship());
        if round % 2 == 0 {
            assert!(
                ship.wait_acked(kit.source.last(), PATIENCE),
                "round {round}: {:?}",
                ship.status()
            );
            kit.assert_same();
        }
    }
}

pub(super) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Goal: a server that was restored from an older copy of its disk gets what it lost, though it had acknowledged it.
#[test]
fn a_server_set_back_to_an_older_copy_gets_the_rest_again() {
    let mut kit = Kit::new();
    kit.source.write(20, 1);
    let shipper = kit.shipped();
    kit.server.take().unwrap().stop();
    let copy = kit.dir.path().join("copy");
    copy_folder(&kit.site(), &copy);
    kit.restart();
    kit.source.write(40, 2);
    assert!(shipper.wait_acked(kit.source.last(), PATIENCE));
    kit.server.take().unwrap().stop();
    std::fs::remove_dir_all(kit.site()).unwrap();
    copy_folder(&copy, &kit.site());
    kit.restart();
    kit.source.write(1, 3);
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    kit.assert_same();
}

#[test]
fn an_agent_set_back_to_an_older_copy_is_refused_and_overwrites_nothing() {
    let mut kit = Kit::new();
    kit.source.write(10, 1);
    let copy = kit.dir.path().join("copy");
    copy_folder(&kit.source.dir, &copy);
    kit.source.write(10, 2);
    let shipper = kit.shipped();
    drop(shipper);
    kit.assert_same();
    let mut older = Source::open(&copy);
    for frames in [0, 10, 20] {
        older.write(frames, 3);
        let shipper = older.ship(&kit.address.to_string(), &kit.identity());
        wait_until("a refusal", || shipper.status().state == TargetState::Refused);
        let why = shipper.status().why.unwrap();
        assert!(
            why.contains("the history there is not that of this store"),
            "{why}"
        );
    }
    kit.assert_same();
}

/// Goal: a full server stops acknowledging and goes on by itself. Method: a bound on the store, raised by a restart.
#[test]
fn a_full_server_acknowledges_nothing_more_and_goes_on_when_there_is_room() {
    let mut kit = Kit::new();
    let full = WriterOptions {
        store_bytes_max: Some(2 << 20),
        ..WriterOptions::default()
    };
    kit.server.take().unwrap().stop();
    kit.server = Some(Running::start_with(&kit.site(), Some(kit.address), full));
    kit.source.write(200, 1);
    let shipper = kit.ship();
    // What found room may still be on its way to the disk when it is full.
    wait_until("a full server", || {
        let status = shipper.status();
        status.full && status.acked_seq > 0
    });
    let status = shipper.status();
    assert!(status.backlog_bytes > 0 && status.lag_seconds > 0.0, "{status:?}");
    assert!(!shipper.wait_acked(kit.source.last(), Duration::ZERO));
    kit.restart();
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    kit.assert_same();
}

#[test]
fn several_servers_are_kept_up_each_on_its_own() {
    let mut kit = Kit::new();
    let other = Running::start(&kit.dir.path().join("other"), None);
    let token = token_of(&kit.dir.path().join("other"), "web01", Right::Append, PATIENCE);
    let address = other.address.to_string();
    // Both certificates lie in one folder.
    crate::net::enroll(&address, &token, Right::Append, &kit.identity()).unwrap();
    kit.source.write(20, 1);
    let ships = [kit.ship(), kit.source.ship(&address, &kit.identity())];
    other.kill();
    kit.source.write(20, 2);
    assert!(
        ships[0].wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        ships[0].status()
    );
    assert!(!ships[1].wait_acked(kit.source.last(), Duration::ZERO));
    let other = Running::start(&kit.dir.path().join("other"), Some(address.parse().unwrap()));
    assert!(
        ships[1].wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        ships[1].status()
    );
    drop(ships);
    other.stop();
}

/// Goal: restores that do not read their answers hold no agent up (V3). Method: a server whose only thread for such work
/// is taken.
#[test]
fn an_agent_ships_though_every_thread_for_answers_is_busy() {
    let mut kit = Kit::new();
    kit.source.write(5, 1);
    kit.server.take().unwrap().stop();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (free, taken) = std::sync::mpsc::channel::<()>();
    runtime.spawn_blocking(move || taken.recv());
    let server = Running::start_on(runtime, &kit.site(), Some(kit.address), WriterOptions::default());
    let shipper = kit.shipped();
    kit.source.write(5, 2);
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    drop(shipper);
    kit.assert_same();
    drop(free);
    server.stop();
}

/// Goal: whoever stops shipping does not wait for a disk or a name server that answers late. Method: a log that does not
/// answer at all before the shipper is gone.
#[test]
fn a_shipper_ends_though_its_log_does_not_answer() {
    struct Stuck {
        log: Arc<Durable>,
        asks: std::sync::mpsc::Sender<()>,
        free: Mutex<std::sync::mpsc::Receiver<()>>,
    }
    impl DurableLog for Stuck {
        fn wait_durable_beyond(&self, beyond: Option<Seq>, timeout: Duration) -> Option<Seq> {
            if !timeout.is_zero() {
                let _ = self.asks.send(());
                let _ = self.free.lock().recv();
            }
            self.log.wait_durable_beyond(beyond, timeout)
        }

        fn log_bytes(&self) -> u64 {
            self.log.log_bytes()
        }
    }
    let mut kit = Kit::new();
    kit.source.write(5, 1);
    let ((freed, free), (asks, asked)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let log = Arc::new(Stuck {
        log: Arc::clone(&kit.source.durable),
        asks,
        free: Mutex::new(free),
    });
    let (address, identity) = (kit.address.to_string(), kit.identity());
    let shipper = Shipper::start(&kit.source.dir, &address, &identity, log, Arc::default()).unwrap();
    asked.recv_timeout(PATIENCE).unwrap();
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(shipper);
        done.send(()).unwrap();
    });
    is_done.recv_timeout(PATIENCE).expect("the shipper to end");
    drop(freed);
}

/// Goal: the limit is kept on the way to the server, and told. Method: frames that take some seconds at it, against the
/// clock: no faster than the limit and its burst allow.
#[test]
fn a_limit_on_the_rate_is_kept() {
    let mut kit = Kit::new();
    kit.source.write(100, 1);
    let limit = 400 << 10;
    let throttle = Arc::new(Throttle::default());
    throttle.set(Schedule::new(vec![format!("{limit} B/s").parse().unwrap()]).unwrap());
    assert_eq!(throttle.limit().map(Rate::bytes_per_second), Some(limit));
    let began = std::time::Instant::now();
    let shipper = kit
        .source
        .ship_at(&kit.address.to_string(), &kit.identity(), &throttle);
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    let seconds = began.elapsed().as_secs_f64();
    let sent = shipper.status().sent_bytes as f64;
    assert!(sent > 3.0 * limit as f64, "{sent} bytes are too few to tell");
    // A quarter of a second may go at once, and the last piece.
    let most = limit as f64 * (seconds + 0.25) + f64::from(16 << 10);
    assert!(sent <= most, "{sent} bytes in {seconds} s");
    kit.assert_same();
    throttle.set(Schedule::default());
    kit.source.write(100, 2);
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
}

/// Goal: what `status` says of a server that takes nothing is true. Method: an agent that is revoked; the oldest write that
/// the server has not is timed, the growth of the log measured; then it is let in again.
#[test]
fn lag_and_backlog_are_those_of_what_the_server_has_not() {
    let mut kit = Kit::new();
    kit.source.write(20, 1);
    let shipper = kit.shipped();
    let acked = kit.source.last().unwrap().get();
    Grants::open(&kit.site()).unwrap().revoke(&name("web01")).unwrap();
    wait_until("a refusal", || shipper.status().state == TargetState::Refused);
    let before = shipper.status();
    assert_eq!(
        (before.lag_seconds, before.backlog_bytes),
        (0.0, 0),
        "nothing is missing there"
    );
    let bytes = kit.source.durable.log_bytes();
    let began = std::time::Instant::now();
    kit.source.write_now(30, 2);
    let grown = kit.source.durable.log_bytes() - bytes;
    wait_until("a lag of more than a second", || {
        shipper.status().lag_seconds > 1.0
    });
    let status = shipper.status();
    let age = began.elapsed().as_secs_f64();
    assert_eq!(status.acked_seq, acked);
    assert!(status.lag_seconds <= age + 0.1, "{status:?}, age {age}");
    assert_eq!(status.backlog_bytes, grown, "{status:?}");
    assert_eq!(
        status.catch_up_seconds, None,
        "nobody knows when it will be let in"
    );
    assert_eq!(shipper.backlog(), None);
    let identity = kit.identity();
    std::fs::remove_dir_all(&identity).unwrap();
    kit.enroll("web01", Right::Append, &identity);
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    let status = shipper.status();
    assert_eq!((status.lag_seconds, status.backlog_bytes), (0.0, 0));
    assert_eq!(status.catch_up_seconds, Some(0.0));
    assert_eq!(shipper.backlog(), Some(0));
    kit.source.write(50, 3);
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    assert_eq!(shipper.backlog(), Some(0), "counted on, over several segments");
}
