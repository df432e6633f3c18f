//! Clients that break the rules: their connection is closed with a reason, and nobody else notices.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use quinn::{Connection, RecvStream};
use rustls::pki_types::CertificateDer;

use super::*;
use crate::format::{Frame, PackedUnit, UnitHash};
use crate::net::Identities;
use crate::net::link::{Link, LinkError, read_message, why_ended};
use crate::net::tls;
use crate::server::clients::CONNECTIONS_EACH_MAX;
use crate::ship::TailFrame;
use crate::wire::fuzz::{Noise, bad_frame, deadline, good_frames};
use crate::wire::{HEADER_BYTES, Header, Kind, Message};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// The next message, or why none comes: who closes a connection ends its streams a moment before.
async fn answer(connection: &Connection, receive: &mut RecvStream) -> Result<(Kind, Vec<u8>), LinkError> {
    let error = match read_message(receive).await {
        Ok(Some(message)) => return Ok(message),
        Ok(None) => LinkError::closed("the stream ended"),
        Err(error) => error,
    };
    Err(why_ended(connection, error).await)
}

/// Says hello over `connection`; gives back why it was closed.
async fn hello(connection: &Connection) -> String {
    let said = async {
        let (mut send, mut receive) = connection.open_bi().await?;
        let hello = Message::Hello {
            log: Uuid::from_u128(1),
            durable: None,
        };
        send.write_all(&hello.encode()).await?;
        answer(connection, &mut receive).await
    };
    match said.await {
        Err(error) => error.to_string(),
        Ok((kind, _)) => panic!("the server answered {kind:?}"),
    }
}

/// Connects and says hello, and tells why that was not liked.
fn talk_over(kit: &Kit, tls: rustls::ClientConfig) -> String {
    runtime().block_on(async {
        match Link::connect(&kit.address.to_string(), tls).await {
            Ok(link) => hello(&link.connection).await,
            Err(error) => error.to_string(),
        }
    })
}

pub(super) fn talk(kit: &Kit, identities: &Identities) -> String {
    talk_over(kit, identities.tls().unwrap())
}

fn authority_of(kit: &Kit) -> Authority {
    let grants = Grants::open(&kit.site()).unwrap();
    Authority::open(grants.dir()).unwrap().unwrap()
}

pub(super) fn talk_without_certificate(kit: &Kit, alpn: &[u8]) -> String {
    let mut tls = tls::enrolling_client(authority_of(kit).fingerprint()).unwrap();
    tls.alpn_protocols = vec![alpn.to_vec()];
    talk_over(kit, tls)
}

/// Trusts `kit` and shows what the authority of `other` made.
pub(super) fn talk_with_foreign_certificate(kit: &Kit, other: &Kit) -> String {
    #[derive(Debug)]
    struct Always(Arc<rustls::sign::CertifiedKey>);
    impl rustls::client::ResolvesClientCert for Always {
        fn resolve(
            &self,
            _hints: &[&[u8]],
            _schemes: &[rustls::SignatureScheme],
        ) -> Option<Arc<rustls::sign::CertifiedKey>> {
            Some(Arc::clone(&self.0))
        }
        fn has_certs(&self) -> bool {
            true
        }
    }
    use rustls::pki_types::pem::PemObject;
    let file = std::fs::read_dir(other.identity())
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let text = std::fs::read(file.path()).unwrap();
    let chain = vec![CertificateDer::from_pem_slice(&text).unwrap()];
    let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(&text).unwrap();
    let provider = rustls::crypto::ring::default_provider();
    let key = rustls::sign::CertifiedKey::from_der(chain, key, &provider).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority_of(kit).certificate().clone()).unwrap();
    talk_over(kit, tls::client(roots, Arc::new(Always(Arc::new(key)))).unwrap())
}

/// An enrolled agent that sends `bytes` where frames are expected; why it was closed.
fn send_frames(kit: &Kit, log: Uuid, bytes: &[u8]) -> String {
    let identities = Identities::load(&kit.identity(), Right::Append).unwrap();
    let talked = async {
        let link = Link::connect(&kit.address.to_string(), identities.tls()?).await?;
        let (mut send, mut receive) = link.connection.open_bi().await?;
        let hello = Message::Hello { log, durable: None };
        send.write_all(&hello.encode()).await?;
        let (kind, _) = answer(&link.connection, &mut receive).await?;
        assert_eq!(kind, Kind::Welcome);
        let mut frames = link.connection.open_uni().await?;
        // The server may close while this is written.
        let written = frames.write_all(bytes).await;
        let _ = frames.finish();
        loop {
            match answer(&link.connection, &mut receive).await {
                Ok((Kind::Ack, _)) => {}
                Ok((other, _)) => panic!("{other:?} after {written:?}"),
                Err(error) => break Ok::<_, LinkError>(error.to_string()),
            }
        }
    };
    // It may also be cut off by the agent's own next connection.
    runtime()
        .block_on(talked)
        .unwrap_or_else(|error| error.to_string())
}

fn frame_message(kit: &Kit, index: usize, previous: Option<Seq>) -> Vec<u8> {
    let mut tail = LogTail::open(&kit.source.dir).unwrap();
    let mut frame = None;
    for _ in 0..=index {
        frame = tail.next(kit.source.last()).unwrap();
    }
    let frame = frame.unwrap().bytes;
    Message::Frame { previous, frame }.encode()
}

/// Goal: whatever an authenticated client sends in place of frames, it is cut off with a reason and nothing is stored.
#[test]
fn what_is_not_the_next_frame_closes_the_connection_and_is_not_stored() {
    let mut kit = Kit::new();
    kit.source.write(5, 1);
    let log = Uuid::from_u128(77);
    let good = frame_message(&kit, 0, None);
    let mut flipped = frame_message(&kit, 1, Some(Seq::FIRST));
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x10;
    let flipped = [good.clone(), flipped].concat();
    let oversized = {
        let mut header = Header::encode(Kind::Frame, 0);
        header[4..].copy_from_slice(&u32::MAX.to_le_bytes());
        header.to_vec()
    };
    let hole = frame_message(&kit, 3, Seq::new(5));
    let other_kind = Message::Ack {
        durable: None,
        full: false,
    }
    .encode();
    let cases = [
        ("noise", vec![0x5a; 4096], "unknown kind"),
        ("oversized", oversized, "it may have"),
        ("another kind", other_kind, "in place of Frame"),
        (
            "no frame",
            [&Header::encode(Kind::Frame, 100)[..], &[7; 100]].concat(),
            "cut short",
        ),
        ("a hole", hole, "the log goes on at 1"),
        ("flipped", flipped, "bad checksum"),
        ("cut", good[..good.len() - 1].to_vec(), "stream"),
    ];
    for (what, bytes, expected) in cases {
        let why = send_frames(&kit, log, &bytes);
        assert!(why.contains(expected), "{what}: {why}");
    }
    drop(kit.shipped());
    let site = Site::open(&kit.site()).unwrap().unwrap();
    let copy = site.log_dir(&name("web01"), log);
    let held = crate::store::StoreReader::open(&copy)
        .unwrap()
        .head()
        .map(|head| head.seq);
    assert_eq!(held, Some(Seq::FIRST), "the one good frame");
}

/// Goal: whoever leaves out what is not here, or tells it wrongly, is cut off with a reason, and nothing is stored.
#[test]
fn what_is_left_out_wrongly_closes_the_connection_and_is_not_stored() {
    let mut kit = Kit::new();
    kit.source.read_back(2, 1);
    drop(kit.shipped());
    // All that was taken in is noted.
    kit.restart();
    let (log, mut tail) = (Uuid::from_u128(78), LogTail::open(&kit.source.dir).unwrap());
    tail.next(kit.source.last()).unwrap();
    let TailFrame { previous, bytes, .. } = tail.next(kit.source.last()).unwrap().unwrap();
    let frame = Frame::parse(&bytes).unwrap();
    let units = frame.packed_units(&bytes);
    let [first, second, ..] = units[..] else {
        panic!("{units:?}");
    };
    let message = |units: &[PackedUnit], thin: Vec<u8>| {
        let units = units.to_vec();
        let before = frame_message(&kit, 0, None);
        let thin = Message::Thin {
            previous,
            units,
            thin,
        };
        [before, thin.encode()].concat()
    };
    let thin = |units: &[PackedUnit]| frame.thin(&bytes, units);
    let unknown = PackedUnit {
        hash: UnitHash::new([7; 32]),
        ..first
    };
    let swapped = PackedUnit {
        hash: second.hash,
        ..first
    };
    let no_group = PackedUnit {
        group: u16::MAX,
        ..first
    };
    let too_many = {
        let mut bytes = message(&[first], thin(&[first]));
        let at = frame_message(&kit, 0, None).len() + HEADER_BYTES + 8;
        bytes[at] = 33;
        bytes
    };
    let mut flipped = thin(&[first]);
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let offer = Message::Offer {
        hashes: vec![first.hash],
    };
    let cases = [
        (
            "what is not here",
            message(&[unknown], thin(&[first])),
            "is not here",
        ),
        (
            "another unit",
            message(&[swapped], thin(&[first])),
            "bad checksum",
        ),
        ("no group", message(&[no_group], thin(&[first])), "no packed unit"),
        (
            "twice",
            message(&[first, first], thin(&[first])),
            "no packed unit",
        ),
        (
            "not in order",
            message(&[second, first], thin(&[first, second])),
            "no packed unit",
        ),
        ("too many", too_many, "makes no sense"),
        ("not left out", message(&[first], bytes.clone()), "cut short"),
        (
            "left out and not told",
            message(&[first], thin(&[first, second])),
            "cut short",
        ),
        (
            "nothing but a head",
            message(&[first], bytes[..200].to_vec()),
            "cut short",
        ),
        ("flipped", message(&[first], flipped), "bad checksum"),
        ("an offer among frames", offer.encode(), "in place of Frame"),
    ];
    for (what, bytes, expected) in cases {
        let why = send_frames(&kit, log, &bytes);
        assert!(why.contains(expected), "{what}: {why}");
    }
    let site = Site::open(&kit.site()).unwrap().unwrap();
    let copy = site.log_dir(&name("web01"), log);
    wait_until("the one good frame", || {
        let store = crate::store::StoreReader::open(&copy).unwrap();
        store.head().map(|head| head.seq) == Some(Seq::FIRST)
    });
    // What is told rightly is taken, from any connection.
    let good = message(&units, thin(&units));
    let why = send_frames(&kit, log, &good);
    assert!(why.contains("stream"), "{why}");
    let last = frame.header.last_seq();
    wait_until("the good thin frame", || {
        let store = crate::store::StoreReader::open(&copy).unwrap();
        store.head().map(|head| head.seq) == Some(last)
    });
}

/// Goal: an agent that has nothing to ship may be silent. Method: one that is, until another that said nothing at all, and
/// came after it, is sent away for that.
#[test]
fn an_agent_without_anything_to_ship_is_left_alone() {
    let kit = Kit::new();
    let other = kit.dir.path().join("other");
    kit.enroll("web02", Right::Append, &other);
    let address = kit.address.to_string();
    let connect = async |dir: &Path| {
        let identities = Identities::load(dir, Right::Append).unwrap();
        Link::connect(&address, identities.tls().unwrap()).await.unwrap()
    };
    runtime().block_on(async {
        let silent = connect(&kit.identity()).await;
        let (mut send, mut receive) = silent.connection.open_bi().await.unwrap();
        let hello = Message::Hello {
            log: Uuid::from_u128(1),
            durable: None,
        };
        send.write_all(&hello.encode()).await.unwrap();
        let welcome = read_message(&mut receive).await.unwrap();
        assert_eq!(welcome.map(|(kind, _)| kind), Some(Kind::Welcome));
        let mute = connect(&other).await;
        let why = LinkError::from(mute.connection.closed().await).to_string();
        assert!(why.contains("nothing was said in time"), "{why}");
        assert!(silent.connection.close_reason().is_none());
        silent.close().await;
    });
}

/// Goal: a server outlives any bytes of an authenticated client. Method: mutations of good frames; the agent beside it
/// ships all the while.
#[test]
fn mutated_frames_leave_the_server_unharmed() {
    let mut kit = Kit::new();
    kit.source.write(5, 1);
    let good = [
        frame_message(&kit, 0, None),
        frame_message(&kit, 1, Some(Seq::FIRST)),
    ]
    .concat();
    let other = kit.dir.path().join("other");
    kit.enroll("web02", Right::Append, &other);
    let shipper = kit.source.ship(&kit.address.to_string(), &other);
    let mutations = (0..good.len(), 1..=255u8, HEADER_BYTES..=good.len());
    let config = ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    // Each case uses a history of its own.
    let log = std::cell::Cell::new(100);
    let source = std::cell::RefCell::new(kit);
    let done = TestRunner::new(config).run(&mutations, |(at, flip, cut)| {
        let mut kit = source.borrow_mut();
        let mut bytes = good.clone();
        bytes[at] ^= flip;
        bytes.truncate(cut);
        log.set(log.get() + 1);
        send_frames(&kit, Uuid::from_u128(log.get()), &bytes);
        kit.source.write(1, 9);
        prop_assert!(shipper.wait_acked(kit.source.last(), PATIENCE));
        Ok(())
    });
    done.unwrap();
}

/// Goal: no frames of an authenticated client harm the server: no thread of it panics, what it took can be read, and others
/// ship all the while. Method: good frames changed behind right checksums, each case a history of its own.
#[test]
fn frames_meant_to_do_harm_leave_the_server_unharmed() {
    static PANICS: AtomicU64 = AtomicU64::new(0);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        if name.starts_with("cdp-") || name.starts_with("tokio") {
            PANICS.fetch_add(1, Ordering::SeqCst);
        }
        before(info);
    }));
    let mut kit = Kit::new();
    let other = kit.dir.path().join("other");
    kit.enroll("web02", Right::Append, &other);
    let shipper = kit.source.ship(&kit.address.to_string(), &other);
    let mut noise = Noise::new();
    let frames = good_frames(Seq::FIRST);
    let (until, mut cases) = (deadline(), 0);
    while cases < 5 || std::time::Instant::now() < until && cases < 2000 {
        cases += 1;
        let good = &frames[noise.below(frames.len())];
        let frame = bad_frame(&mut noise, good);
        let message = Message::Frame {
            previous: None,
            frame,
        }
        .encode();
        let log = Uuid::from_u128(1000 + cases);
        send_frames(&kit, log, &message);
        assert_eq!(
            PANICS.load(Ordering::SeqCst),
            0,
            "a thread of the server panicked in case {cases}"
        );
        let site = Site::open(&kit.site()).unwrap().unwrap();
        let dir = site.log_dir(&name("web01"), log);
        // The next connection waits for this one's threads: what it took lies there by then.
        kit.source.write(1, 9);
        assert!(
            shipper.wait_acked(kit.source.last(), PATIENCE),
            "{:?}",
            shipper.status()
        );
        if let Ok(store) = crate::store::StoreReader::open(&dir)
            && let Ok(volumes) = store.volumes()
        {
            for volume in volumes {
                let _ = store.history(volume.id);
            }
        }
        let _ = std::fs::remove_dir_all(&dir);
    }
    eprintln!("{cases} cases");
}

/// Who never closes a connection keeps nobody else out.
#[test]
fn one_certificate_does_not_get_all_connections() {
    let mut kit = Kit::new();
    let reader = kit.dir.path().join("reader");
    kit.enroll("web01", Right::Read, &reader);
    let identities = Identities::load(&reader, Right::Read).unwrap();
    runtime().block_on(async {
        let address = kit.address.to_string();
        let mut links = Vec::new();
        for _ in 0..=CONNECTIONS_EACH_MAX {
            links.push(Link::connect(&address, identities.tls().unwrap()).await.unwrap());
        }
        let mut closed = tokio::task::JoinSet::new();
        for connection in links.iter().map(|link| link.connection.clone()) {
            closed.spawn(async move { LinkError::from(connection.closed().await).to_string() });
        }
        let first = tokio::time::timeout(PATIENCE, closed.join_next()).await.unwrap();
        let why = first.unwrap().unwrap();
        assert!(why.contains("64 connections of"), "{why}");
        let open = links
            .iter()
            .filter(|link| link.connection.close_reason().is_none());
        assert_eq!(open.count(), CONNECTIONS_EACH_MAX);
        // Others do not notice.
        kit.source.write_now(1, 1);
        kit.shipped();
    });
}
