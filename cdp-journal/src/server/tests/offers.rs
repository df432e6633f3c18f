//! What a server has is not sent again, and what it makes of the rest is the same log.

use super::follow::Follower;
use super::*;
use crate::format::{Frame, UnitHash};
use crate::net::Identities;
use crate::net::link::{Link, read_message};
use crate::net::{TargetState, TargetStatus};
use crate::server::ask_status;
use crate::ship::Schedule;
use crate::site::SiteLog;
use crate::store::LOG_DIR;
use crate::wire::{ALPNS, Close, Kind, Message};

/// Frames of a first copy: 20 MiB.
const FRAMES: u64 = 40;
/// A machine may be so slow that an answer is not waited for.
const ROUNDS: usize = 5;

/// A server that has a first copy of `web01`, and has noted all of it.
fn kit_with_a_copy(offers: Offers) -> Kit {
    let mut kit = Kit::new();
    kit.source.read_back(FRAMES, 1);
    drop(kit.shipped());
    kit.restart_offered(offers);
    kit
}

/// Ships another first copy of the same content under a certificate, and asserts that it arrives as it is.
fn ship_again(kit: &Kit, agent: &str, identity: &Path, round: usize) -> TargetStatus {
    let mut again = Source::open(&kit.dir.path().join(format!("{agent}-again-{round}")));
    again.read_back(FRAMES, 1);
    let shipper = again.ship(&kit.address.to_string(), identity);
    assert!(
        shipper.wait_acked(again.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    again.assert_same_as(&copy_of(kit, &again, agent));
    shipper.status()
}

fn copy_of(kit: &Kit, source: &Source, agent: &str) -> PathBuf {
    let site = Site::open(&kit.site()).unwrap().unwrap();
    site.log_dir(&name(agent), LogTail::open(&source.dir).unwrap().store())
}

fn is_mostly_saved(status: &TargetStatus) -> bool {
    let whole = status.sent_bytes + status.saved_bytes;
    eprintln!("sent {} of {whole} bytes", status.sent_bytes);
    assert!(whole > FRAMES * UNITS_PER_FRAME * UNIT_BYTES);
    status.sent_bytes * 10 < whole
}

/// Goal: a store that is begun anew with the same content costs a small part of it, also after the server was started anew.
#[test]
fn a_first_copy_that_is_there_is_not_sent_again() {
    let kit = kit_with_a_copy(Offers::Own);
    let saved = (0..ROUNDS).any(|round| is_mostly_saved(&ship_again(&kit, "web01", &kit.identity(), round)));
    assert!(saved, "nothing was saved in {ROUNDS} rounds");
    let site = Site::open(&kit.site()).unwrap().unwrap();
    for SiteLog { dir, .. } in site.logs().unwrap() {
        let store = crate::store::StoreReader::open(&dir).unwrap();
        let report = store.verify_log(&mut |_| {}).unwrap();
        assert!(report.damages.is_empty(), "{:?}", report.damages);
    }
}

#[test]
fn what_another_agent_has_counts_only_if_the_server_says_so() {
    let mut kit = kit_with_a_copy(Offers::Own);
    let other = kit.dir.path().join("other");
    kit.enroll("web02", Right::Append, &other);
    assert_eq!(ship_again(&kit, "web02", &other, 0).saved_bytes, 0);
    kit.restart_offered(Offers::Off);
    assert_eq!(
        ship_again(&kit, "web01", &kit.identity(), 0).saved_bytes,
        0,
        "its own, but nothing is looked for"
    );
    kit.restart_offered(Offers::All);
    let third = kit.dir.path().join("third");
    kit.enroll("web03", Right::Append, &third);
    let saved = (0..ROUNDS).any(|round| ship_again(&kit, "web03", &third, round).saved_bytes > 0);
    assert!(saved, "nothing was saved in {ROUNDS} rounds");
}

/// A line on which the frames of a first copy take ten seconds without what is left out of them.
fn slow_line() -> Arc<Throttle> {
    let throttle = Arc::new(Throttle::default());
    let windows = vec!["4 KiB/s".parse().unwrap()];
    throttle.set(Schedule::new(windows).unwrap());
    throttle
}

/// Goal: content that is lost after it was promised costs bytes and never a frame. Method: a slow line, on which much was
/// promised and little sent when the log that the content lies in is damaged or removed.
#[test]
fn content_that_is_lost_after_all_is_sent() {
    for is_removed in [true, false] {
        let kit = kit_with_a_copy(Offers::Own);
        let mut again = Source::open(&kit.dir.path().join("again"));
        again.read_back(FRAMES, 1);
        let throttle = slow_line();
        let shipper = again.ship_at(&kit.address.to_string(), &kit.identity(), &throttle);
        wait_until("a thin frame", || shipper.status().saved_bytes > 0);
        match is_removed {
            true => std::fs::remove_dir_all(copy_of(&kit, &kit.source, "web01").join(LOG_DIR)).unwrap(),
            false => damage(&kit),
        }
        throttle.set(Schedule::default());
        assert!(
            shipper.wait_acked(again.last(), PATIENCE),
            "{:?}",
            shipper.status()
        );
        again.assert_same_as(&copy_of(&kit, &again, "web01"));
        let status = shipper.status();
        assert_eq!(status.state, TargetState::Connected);
        assert!(
            status.sent_bytes + status.saved_bytes > again.frame_bytes(),
            "nothing was sent twice: {status:?}"
        );
    }
}

/// Goal: what cannot be read whole is not said to be there. Method: an agent by hand, that asks before and after the server's
/// log was damaged.
#[test]
fn what_is_damaged_is_not_said_to_be_there() {
    let kit = kit_with_a_copy(Offers::Own);
    let mut tail = LogTail::open(&kit.source.dir).unwrap();
    tail.next(kit.source.last()).unwrap();
    let bytes = tail.next(kit.source.last()).unwrap().unwrap().bytes;
    let units = Frame::parse(&bytes).unwrap().packed_units(&bytes);
    let mut hashes: Vec<_> = units.iter().map(|unit| unit.hash).collect();
    hashes[1] = UnitHash::new([7; 32]);
    let offer = Message::Offer { hashes }.encode();
    let all_but_the_second = (1 << units.len()) - 1 - 2;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(async {
        let tls = Identities::load(&kit.identity(), Right::Append).unwrap().tls();
        let link = Link::connect(&kit.address.to_string(), tls.unwrap())
            .await
            .unwrap();
        let (mut send, mut receive) = link.connection.open_bi().await.unwrap();
        let hello = Message::Hello {
            log: Uuid::from_u128(5),
            durable: None,
        };
        send.write_all(&hello.encode()).await.unwrap();
        let (kind, _) = read_message(&mut receive).await.unwrap().unwrap();
        assert_eq!(kind, Kind::Welcome);
        for expected in [all_but_the_second, 0] {
            send.write_all(&offer).await.unwrap();
            let (kind, body) = read_message(&mut receive).await.unwrap().unwrap();
            let have = Message::decode(kind, &body).unwrap();
            assert_eq!(have, Message::Have { bits: expected });
            damage(&kit);
        }
        link.close().await;
    });
}

/// Changes a byte in each 1000 of the log that the server has.
fn damage(kit: &Kit) {
    for entry in std::fs::read_dir(copy_of(kit, &kit.source, "web01").join(LOG_DIR)).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes
            .iter_mut()
            .skip(1000)
            .step_by(1000)
            .for_each(|byte| *byte ^= 1);
        std::fs::write(path, bytes).unwrap();
    }
}

/// Goal: no duplicate and no hole where either end is ended without a word while thin frames are on their way.
#[test]
fn either_end_may_be_killed_among_thin_frames() {
    let mut kit = kit_with_a_copy(Offers::Own);
    let mut again = Source::open(&kit.dir.path().join("again"));
    let mut shipper = Some(again.ship(&kit.address.to_string(), &kit.identity()));
    let mut saved = false;
    for round in 0..8 {
        again.write(u64::from(round == 4), 50);
        again.read_back(5, 1);
        if round % 2 == 0 {
            kit.server.take().unwrap().kill();
        }
        if round % 3 == 0 {
            drop(shipper.take());
        }
        again.read_back(3, 1);
        if kit.server.is_none() {
            kit.restart();
        }
        let ship = shipper.get_or_insert_with(|| again.ship(&kit.address.to_string(), &kit.identity()));
        if round % 2 == 1 {
            assert!(
                ship.wait_acked(again.last(), PATIENCE),
                "round {round}: {:?}",
                ship.status()
            );
            again.assert_same_as(&copy_of(&kit, &again, "web01"));
            saved |= ship.status().saved_bytes > 0;
        }
    }
    assert!(saved, "no thin frame");
}

/// Goal: a follower is offered what it has, too.
#[test]
fn a_follower_gets_only_what_it_does_not_have() {
    let mut kit = kit_with_a_copy(Offers::Own);
    let mut follower = Follower::of(&kit, "b");
    follower.wait_for(&kit.source);
    // What it took in is noted by the time it has stopped.
    follower.run();
    let saved = (0..ROUNDS).any(|round| {
        let dir = kit.dir.path().join(format!("again-{round}"));
        kit.source = Source::open(&dir);
        kit.source.read_back(FRAMES, 1);
        drop(kit.shipped());
        let log = LogTail::open(&dir).unwrap().store().to_string();
        let last = Seq::number_of(kit.source.last());
        let mut saved_bytes = 0;
        wait_until("the follower to have it", || {
            let status = ask_status(&follower.site).unwrap().unwrap();
            let agent = status.agents.into_iter().find(|agent| agent.log == log);
            agent.is_some_and(|agent| {
                saved_bytes = agent.saved_bytes.max(saved_bytes);
                agent.durable_seq == last
            })
        });
        let site = Site::open(&follower.site).unwrap().unwrap();
        kit.source
            .assert_same_as(&site.log_dir(&name("web01"), log.parse().unwrap()));
        saved_bytes > 0
    });
    assert!(saved, "nothing was saved in {ROUNDS} rounds");
}

/// A follower by hand.
struct ByHand {
    link: Link,
    receive: quinn::RecvStream,
    send: quinn::SendStream,
    frames: quinn::RecvStream,
}

impl ByHand {
    /// Asks the kit's server for the history, of which it holds nothing.
    async fn follow(kit: &Kit, tls: rustls::ClientConfig) -> Self {
        let log = LogTail::open(&kit.source.dir).unwrap().store();
        let link = Link::connect(&kit.address.to_string(), tls).await.unwrap();
        let (mut send, mut receive) = link.connection.open_bi().await.unwrap();
        let agent = name("web01");
        send.write_all(&Message::Follow { log, agent }.encode())
            .await
            .unwrap();
        let (kind, _) = read_message(&mut receive).await.unwrap().unwrap();
        assert_eq!(kind, Kind::Hello);
        let welcome = Message::Welcome { held: None };
        send.write_all(&welcome.encode()).await.unwrap();
        let frames = link.connection.accept_uni().await.unwrap();
        Self {
            link,
            receive,
            send,
            frames,
        }
    }

    async fn next_frame(&mut self) -> Kind {
        read_message(&mut self.frames).await.unwrap().unwrap().0
    }

    /// Is every frame sent as it is, and nothing offered?
    async fn gets_everything(&mut self) -> bool {
        let mut is_whole = true;
        for _ in 0..=FRAMES {
            is_whole &= self.next_frame().await == Kind::Frame;
        }
        // An offer would have come before the second of them.
        for _ in 0..2 {
            let (kind, _) = read_message(&mut self.receive).await.unwrap().unwrap();
            is_whole &= kind == Kind::Standing;
        }
        is_whole
    }
}

/// Goal: who said it has what it turns out to lack is sent everything from then on, and asked nothing for a while, on
/// further connections too. Method: a follower by hand that says it has all that it is offered, and lacks it as soon as
/// it is left out.
#[test]
fn who_lacks_what_it_said_it_has_is_not_asked_again() {
    let kit = kit_with_a_copy(Offers::Own);
    let identity = kit.dir.path().join("follow");
    kit.enroll("b", Right::Follow, &identity);
    let tls = || Identities::load(&identity, Right::Follow).unwrap().tls().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(async {
        let deadline = std::time::Instant::now() + PATIENCE;
        let is_there = |round| assert!(std::time::Instant::now() < deadline, "round {round}");
        for round in 0.. {
            is_there(round);
            let ByHand {
                link,
                mut receive,
                mut send,
                mut frames,
            } = ByHand::follow(&kit, tls()).await;
            let answers = tokio::spawn(async move {
                while let Ok(Some((kind, body))) = read_message(&mut receive).await {
                    if let Ok(Message::Offer { hashes }) = Message::decode(kind, &body) {
                        let bits = (1 << hashes.len()) - 1;
                        let _ = send.write_all(&Message::Have { bits }.encode()).await;
                    }
                }
            });
            let mut kinds = Vec::new();
            while kinds.len() as u64 <= FRAMES && kinds.last() != Some(&Kind::Thin) {
                kinds.push(read_message(&mut frames).await.unwrap().unwrap().0);
            }
            answers.abort();
            // A machine may be so slow that no answer was waited for.
            if kinds.last() == Some(&Kind::Thin) {
                crate::net::link::close(&link.connection, Close::Lacking, "it is gone");
                link.close().await;
                break;
            }
            link.close().await;
        }
        // The server may take a moment to hear of it.
        for round in 0.. {
            is_there(round);
            let mut again = ByHand::follow(&kit, tls()).await;
            let is_whole = again.gets_everything().await;
            again.link.close().await;
            if is_whole {
                break;
            }
        }
    });
}

/// Goal: who speaks the first format only is not offered anything, and gets every frame. Method: a follower of that format,
/// by hand.
#[test]
fn who_knows_nothing_of_offers_is_sent_everything() {
    let kit = kit_with_a_copy(Offers::Own);
    let identity = kit.dir.path().join("follow");
    kit.enroll("b", Right::Follow, &identity);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(async {
        let mut tls = Identities::load(&identity, Right::Follow).unwrap().tls().unwrap();
        tls.alpn_protocols = vec![ALPNS[1].to_vec()];
        let mut follower = ByHand::follow(&kit, tls).await;
        assert_eq!(
            crate::net::link::protocol(&follower.link.connection).as_deref(),
            Some(ALPNS[1])
        );
        assert!(follower.gets_everything().await);
        follower.link.close().await;
    });
}
