//! A server that follows another holds what that one holds: the same frames, whatever is cut in between.

use super::remote::assert_same_view;
use super::ship::copy_folder;
use super::*;
use crate::net::TargetState;
use crate::remote::RemoteSite;
use crate::server::{AgentStatus, ServerStatus, UpstreamOptions, ask_status};
use crate::ship::Schedule;
use crate::store::{Archive, StoreReader};
use crate::wire::fuzz::Noise;

/// A server that follows.
pub(super) struct Follower {
    pub(super) site: PathBuf,
    identity: PathBuf,
    upstream: SocketAddr,
    writer: WriterOptions,
    rate: Schedule,
    address: Option<SocketAddr>,
    server: Option<Running>,
}

impl Follower {
    /// Enrols `label` with the upstream, whose folder is `site`, and starts to follow it.
    fn start(kit: &Kit, label: &str, site: &Path, upstream: SocketAddr) -> Self {
        let mut follower = Self {
            site: kit.dir.path().join(label),
            identity: kit.dir.path().join(format!("{label}-identity")),
            upstream,
            writer: WriterOptions::default(),
            rate: Schedule::default(),
            address: None,
            server: None,
        };
        follower.enroll(label, site);
        follower.run();
        follower
    }

    /// A follower of the kit's server.
    pub(super) fn of(kit: &Kit, label: &str) -> Self {
        Self::start(kit, label, &kit.site(), kit.address)
    }

    fn enroll(&self, label: &str, site: &Path) {
        let token = token_of(site, label, Right::Follow, Duration::from_secs(3600));
        crate::net::enroll(&self.upstream.to_string(), &token, Right::Follow, &self.identity).unwrap();
    }

    /// Starts it, where it was if it has run before.
    pub(super) fn run(&mut self) {
        let upstream = UpstreamOptions {
            server: self.upstream.to_string(),
            identity: self.identity.clone(),
            rate: self.rate.clone(),
        };
        self.run_with(Some(upstream));
    }

    fn run_with(&mut self, upstream: Option<UpstreamOptions>) {
        drop(self.server.take());
        let options = ServeOptions {
            store: self.site.clone(),
            listen: self.address.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap()),
            writer: self.writer.clone(),
            upstream,
            offers: Offers::Own,
        };
        let server = Running::serve(Running::runtime(), options);
        self.address = Some(server.address);
        self.server = Some(server);
    }

    fn address(&self) -> SocketAddr {
        self.address.unwrap()
    }

    /// Waits until it holds all of the log.
    pub(super) fn wait_for(&self, source: &Source) {
        let last = Seq::number_of(source.last());
        wait_for_status(&self.site, &format!("seq {last}"), |status| {
            status.agents.iter().any(|agent| agent.durable_seq == last)
        });
    }
}

fn status(site: &Path) -> Option<ServerStatus> {
    ask_status(site).ok().flatten()
}

fn wait_for_status(site: &Path, what: &str, mut done: impl FnMut(&ServerStatus) -> bool) -> ServerStatus {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let status = status(site);
        match status {
            Some(status) if done(&status) => return status,
            status => assert!(
                std::time::Instant::now() < deadline,
                "not within {PATIENCE:?}: {what}: {status:#?}"
            ),
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

fn agent<'a>(status: &'a ServerStatus, name: &str) -> Option<&'a AgentStatus> {
    status.agents.iter().find(|agent| agent.agent == name)
}

/// SHA-256 stands in the tests of the whole system; here the bytes themselves are compared.
fn assert_same_views(source: &Source, site: &Path) {
    let site = Site::open(site).unwrap().unwrap();
    let copy = site.logs_of(&name("web01")).unwrap().remove(0);
    let (here, there) = (
        StoreReader::open(&source.dir).unwrap(),
        StoreReader::open(&copy.dir).unwrap(),
    );
    let (last, volume) = (source.last().unwrap(), VolumeId::new(1).unwrap());
    for seq in [last.get() / 3, last.get() / 2, last.get()] {
        let seq = Seq::new(seq).unwrap();
        let (here, there) = (here.view(volume, seq).unwrap(), there.view(volume, seq).unwrap());
        assert_same_view(&here, &there, Some(Seq::FIRST));
    }
}

/// Goal: A to B to C hold the same frames, deltas included, and C serves restores of them. Method: an agent's log with every
/// kind of block; frames and views are compared, those of C also over the network.
#[test]
fn a_chain_of_three_holds_the_same_frames_and_views() {
    let mut kit = Kit::new();
    let b = Follower::of(&kit, "b");
    let c = Follower::start(&kit, "c", &b.site, b.address());
    kit.source.write(60, 1);
    let shipper = kit.shipped();
    for edit in [0, 1, 40] {
        kit.source.write_edited(60, 1, edit);
    }
    assert!(kit.source.cache.counts().patched > 60);
    for follower in [&b, &c] {
        follower.wait_for(&kit.source);
        kit.source.assert_copied(&follower.site);
        assert_same_views(&kit.source, &follower.site);
    }
    let read = kit.dir.path().join("read");
    let token = token_of(&c.site, "web01", Right::Read, PATIENCE);
    crate::net::enroll(&c.address().to_string(), &token, Right::Read, &read).unwrap();
    let site = RemoteSite::open(&c.address().to_string(), &read, PATIENCE).unwrap();
    let there = site.stores().unwrap().remove(0).2;
    let here = StoreReader::open(&kit.source.dir).unwrap();
    let (last, volume) = (kit.source.last().unwrap(), VolumeId::new(1).unwrap());
    let there = Archive::view(&there, volume, last).unwrap();
    assert_same_view(&here.view(volume, last).unwrap(), &there, Some(Seq::FIRST));
    drop(shipper);
}

/// Goal: no duplicate, no hole, nothing lost on the way down a chain. Method: rounds in which any of the three servers is
/// ended without a word, or as asked, while frames are on their way; the logs are compared frame by frame.
#[test]
fn any_server_of_a_chain_may_be_killed_at_any_time() {
    let mut noise = Noise::new();
    let mut kit = Kit::new();
    let mut b = Follower::of(&kit, "b");
    let mut c = Follower::start(&kit, "c", &b.site, b.address());
    let _shipper = kit.ship();
    for round in 0..10 {
        kit.source.write(3 + noise.below(8) as u64, round);
        for follower in [&mut b, &mut c] {
            match noise.below(4) {
                0 => follower.server.take().unwrap().kill(),
                1 => follower.server.take().unwrap().stop(),
                _ => {}
            }
        }
        if noise.below(4) == 0 {
            kit.server.take().unwrap().kill();
        }
        kit.source.write(noise.below(5) as u64, round + 100);
        if kit.server.is_none() {
            kit.restart();
        }
        for follower in [&mut b, &mut c] {
            if follower.server.is_none() {
                follower.run();
            }
        }
        if round % 3 == 2 {
            c.wait_for(&kit.source);
            kit.source.assert_copied(&b.site);
            kit.source.assert_copied(&c.site);
        }
    }
    c.wait_for(&kit.source);
    kit.source.assert_copied(&b.site);
    kit.source.assert_copied(&c.site);
}

/// Goal: the end of a chain does not call itself up to date while its middle is cut off. Method: end the first server.
#[test]
fn the_end_of_a_chain_is_as_far_behind_as_its_middle() {
    let mut kit = Kit::new();
    let b = Follower::of(&kit, "b");
    let c = Follower::start(&kit, "c", &b.site, b.address());
    kit.source.write_now(20, 1);
    let _shipper = kit.shipped();
    c.wait_for(&kit.source);
    let lag = |status: &ServerStatus| agent(status, "web01").and_then(|agent| agent.lag_seconds);
    wait_for_status(&c.site, "nothing to be missing", |status| {
        lag(status) == Some(0.0)
    });
    kit.server.take().unwrap().kill();
    let told = wait_for_status(&c.site, "the cut to be seen", |status| lag(status) > Some(5.0));
    assert_eq!(told.upstream.unwrap().state, TargetState::Connected);
    kit.restart();
    wait_for_status(&c.site, "nothing to be missing again", |status| {
        lag(status) == Some(0.0)
    });
}

/// Goal: a server of a chain that is set back to an older copy of its disk, follower or upstream, ends up with everything,
/// and so do the others. Method: each in turn is.
#[test]
fn a_server_of_a_chain_that_is_set_back_gets_the_rest_again() {
    for which in 0..2 {
        let mut kit = Kit::new();
        let mut b = Follower::of(&kit, "b");
        let c = Follower::start(&kit, "c", &b.site, b.address());
        kit.source.write(20, 1);
        let shipper = kit.shipped();
        c.wait_for(&kit.source);
        let copy = kit.dir.path().join("copy");
        let site = [kit.site(), b.site.clone()][which].clone();
        let end = |kit: &mut Kit, b: &mut Follower| match which {
            0 => kit.server.take().unwrap().stop(),
            _ => b.server.take().unwrap().stop(),
        };
        end(&mut kit, &mut b);
        copy_folder(&site, &copy);
        let start = |kit: &mut Kit, b: &mut Follower| match which {
            0 => kit.restart(),
            _ => b.run(),
        };
        start(&mut kit, &mut b);
        kit.source.write(40, 2);
        c.wait_for(&kit.source);
        let before = Seq::number_of(kit.source.last());
        // The upstream alone is set back: for a while it has less than its followers.
        let agent_is_away = which == 0;
        let shipper = match agent_is_away {
            true => {
                drop(shipper);
                None
            }
            false => Some(shipper),
        };
        end(&mut kit, &mut b);
        std::fs::remove_dir_all(&site).unwrap();
        copy_folder(&copy, &site);
        start(&mut kit, &mut b);
        if agent_is_away {
            let told = wait_for_status(&b.site, "an upstream that has less", |status| {
                let why = agent(status, "web01").and_then(|agent| agent.why.as_deref());
                why.is_some_and(|why| why.contains("only, and this server up to"))
            });
            assert_eq!(agent(&told, "web01").unwrap().durable_seq, before);
        }
        let _shipper = shipper.unwrap_or_else(|| kit.ship());
        kit.source.write(5, 3);
        c.wait_for(&kit.source);
        kit.assert_same();
        kit.source.assert_copied(&b.site);
        kit.source.assert_copied(&c.site);
        let told = status(&b.site).unwrap();
        assert_eq!(agent(&told, "web01").unwrap().why, None, "{told:?}");
    }
}

/// Goal: two histories with one id are never mixed. Method: agent and upstream are both set back and go on otherwise.
#[test]
fn a_history_that_went_another_way_is_refused_and_overwrites_nothing() {
    let mut kit = Kit::new();
    let b = Follower::of(&kit, "b");
    kit.source.write(10, 1);
    let shipper = kit.shipped();
    b.wait_for(&kit.source);
    drop(shipper);
    kit.server.take().unwrap().stop();
    let copies = [kit.dir.path().join("old"), kit.dir.path().join("old-site")];
    copy_folder(&kit.source.dir, &copies[0]);
    copy_folder(&kit.site(), &copies[1]);
    kit.restart();
    kit.source.write(10, 2);
    let shipper = kit.shipped();
    b.wait_for(&kit.source);
    drop(shipper);
    kit.server.take().unwrap().stop();
    std::fs::remove_dir_all(kit.site()).unwrap();
    copy_folder(&copies[1], &kit.site());
    kit.restart();
    let mut older = Source::open(&copies[0]);
    older.write(20, 3);
    let _shipper = older.ship(&kit.address.to_string(), &kit.identity());
    let told = wait_for_status(&b.site, "a refusal", |status| {
        let why = agent(status, "web01").and_then(|agent| agent.why.clone());
        let is_connected = status.upstream.as_ref().unwrap().state == TargetState::Connected;
        // The others go on.
        is_connected && why.is_some_and(|why| why.contains("two histories of agent web01"))
    });
    assert_eq!(
        agent(&told, "web01").unwrap().durable_seq,
        Seq::number_of(kit.source.last())
    );
    kit.source.assert_copied(&b.site);
}

#[test]
fn a_revoked_follower_is_cut_off_and_let_in_again_with_a_new_token() {
    let mut kit = Kit::new();
    let b = Follower::of(&kit, "b");
    kit.source.write(3, 1);
    let shipper = kit.shipped();
    b.wait_for(&kit.source);
    let before = Seq::number_of(kit.source.last());
    Grants::open(&kit.site()).unwrap().revoke(&name("b")).unwrap();
    let told = wait_for_status(&b.site, "a refusal", |status| {
        let upstream = status.upstream.as_ref().unwrap();
        upstream.state == TargetState::Refused && agent(status, "web01").is_some_and(|a| !a.connected)
    });
    let why = told.upstream.unwrap().why.unwrap();
    assert!(why.contains("follower b was revoked"), "{why}");
    kit.source.write(3, 2);
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "the agent goes on"
    );
    let told = wait_for_status(&b.site, "a lag that grows", |status| {
        agent(status, "web01").unwrap().lag_seconds > Some(2.0)
    });
    assert_eq!(agent(&told, "web01").unwrap().durable_seq, before);
    b.enroll("b", &kit.site());
    b.wait_for(&kit.source);
    kit.source.assert_copied(&b.site);
}

/// Goal: who may follow can do nothing else, and nobody else can follow. Method: each tries what it may not.
#[test]
fn to_follow_is_a_right_of_its_own() {
    let mut kit = Kit::new();
    kit.source.write(3, 1);
    drop(kit.shipped());
    let follow = kit.dir.path().join("follow");
    kit.enroll("b", Right::Follow, &follow);
    let shipper = kit.source.ship(&kit.address.to_string(), &follow);
    wait_until("a refusal", || shipper.status().state == TargetState::Refused);
    let why = shipper.status().why.unwrap();
    assert!(why.contains("follower b may follow and not append"), "{why}");
    let site = RemoteSite::open(&kit.address.to_string(), &follow, Duration::ZERO).unwrap();
    let why = site.stores().err().unwrap().to_string();
    assert!(why.contains("follower b may follow and not read"), "{why}");
    let read = kit.dir.path().join("read");
    kit.enroll("web01", Right::Read, &read);
    for (identity, right) in [(kit.identity(), "append"), (read, "read")] {
        let mut b = Follower {
            site: kit.dir.path().join(format!("b-{right}")),
            identity,
            upstream: kit.address,
            writer: WriterOptions::default(),
            rate: Schedule::default(),
            address: None,
            server: None,
        };
        b.run();
        let told = wait_for_status(&b.site, "a refusal", |status| {
            status.upstream.as_ref().unwrap().state == TargetState::Refused
        });
        let why = told.upstream.unwrap().why.unwrap();
        assert!(
            why.contains(&format!("may {right} and not follow")) && why.contains("--follow"),
            "{why}"
        );
        assert!(told.agents.is_empty(), "{:?}", told.agents);
    }
}

/// Goal: nobody but the upstream appends to what is followed, also after a restart; and an agent can go on here once the server
/// follows nobody, which is what the copy is for. Method: an agent that ships to the follower.
#[test]
fn an_agent_cannot_append_to_what_the_server_follows() {
    let mut kit = Kit::new();
    let mut b = Follower::of(&kit, "b");
    kit.source.write(5, 1);
    drop(kit.shipped());
    b.wait_for(&kit.source);
    let identity = kit.dir.path().join("at-b");
    let token = token_of(&b.site, "web01", Right::Append, PATIENCE);
    crate::net::enroll(&b.address().to_string(), &token, Right::Append, &identity).unwrap();
    kit.source.write(5, 2);
    for _ in 0..2 {
        let shipper = kit.source.ship(&b.address().to_string(), &identity);
        wait_until("a refusal", || shipper.status().state == TargetState::Refused);
        let why = shipper.status().why.unwrap();
        let server = kit.address.to_string();
        assert!(
            why.contains("no agent can append to it here") && why.contains(&format!("ship to {server}")),
            "{why}"
        );
        b.run();
    }
    b.run_with(None);
    let shipper = kit.source.ship(&b.address().to_string(), &identity);
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    kit.source.assert_copied(&b.site);
}

/// Goal: agents and histories that are new at the upstream come by themselves, under their names and in their order; those
/// that have ended are copied once and left alone.
#[test]
fn new_agents_and_old_histories_come_by_themselves() {
    let mut kit = Kit::new();
    kit.source.write(5, 1);
    drop(kit.shipped());
    // The agent begins anew...
    let mut second = Source::open(&kit.dir.path().join("second"));
    second.write(7, 2);
    let again = second.ship(&kit.address.to_string(), &kit.identity());
    assert!(again.wait_acked(second.last(), PATIENCE), "{:?}", again.status());
    let b = Follower::of(&kit, "b");
    b.wait_for(&second);
    // ... and another one comes.
    let mut other = Source::open(&kit.dir.path().join("other"));
    other.write(9, 3);
    let identity = kit.dir.path().join("web02");
    kit.enroll("web02", Right::Append, &identity);
    let _other_ships = other.ship(&kit.address.to_string(), &identity);
    let seqs = |source: &Source| Seq::number_of(source.last());
    let expected = [
        ("web01".to_owned(), seqs(&second)),
        ("web01~1".to_owned(), seqs(&kit.source)),
        ("web02".to_owned(), seqs(&other)),
    ];
    let told = wait_for_status(&b.site, "three histories", |status| {
        let found: Vec<_> = status
            .agents
            .iter()
            .map(|a| (a.agent.clone(), a.durable_seq))
            .collect();
        found == expected
    });
    assert!(told.agents.iter().all(|agent| agent.followed), "{told:?}");
    wait_for_status(&b.site, "the old one to be left alone", |status| {
        let [new, old, _] = &status.agents[..] else {
            return false;
        };
        new.connected && !old.connected && old.why.is_none() && old.lag_seconds == Some(0.0)
    });
}

/// Goal: what `status` says of a follower is true. Method: nothing missing; then the follower is full, and behind by what was
/// written since; the other histories go on, and it too when there is room.
#[test]
fn a_full_follower_is_behind_and_holds_nobody_up() {
    let mut kit = Kit::new();
    let mut b = Follower::of(&kit, "b");
    b.writer.store_bytes_max = Some(2 << 20);
    b.run();
    kit.source.write_now(20, 1);
    let shipper = kit.shipped();
    let told = wait_for_status(&b.site, "to be up with it", |status| {
        let Some(agent) = agent(status, "web01") else {
            return false;
        };
        agent.source_seq == kit.source.last().map(Seq::get)
            && (agent.lag_seconds, agent.backlog_bytes) == (Some(0.0), Some(0))
    });
    assert_eq!(told.upstream.unwrap().state, TargetState::Connected);
    kit.source.write_now(200, 2);
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    let told = wait_for_status(&b.site, "a full follower", |status| {
        let agent = agent(status, "web01").unwrap();
        agent.full
            && agent.source_seq == kit.source.last().map(Seq::get)
            && agent.lag_seconds > Some(1.0)
            && agent.backlog_bytes > Some(0)
    });
    assert!(agent(&told, "web01").unwrap().source_seq > Some(agent(&told, "web01").unwrap().durable_seq));
    let mut other = Source::open(&kit.dir.path().join("other"));
    let identity = kit.dir.path().join("web02");
    kit.enroll("web02", Right::Append, &identity);
    other.write(5, 3);
    let _other_ships = other.ship(&kit.address.to_string(), &identity);
    b.wait_for(&other);
    b.writer.store_bytes_max = None;
    b.run();
    b.wait_for(&kit.source);
    kit.source.assert_copied(&b.site);
    let told = status(&kit.site()).unwrap();
    assert_eq!(told.followers.len(), 1, "{:?}", told.followers);
    assert_eq!(told.followers[0].follower, "b");
}

/// Goal: a follower takes no more than its limit allows, and says so. Method: frames that take some seconds at it, against
/// the clock; then without a limit.
#[test]
fn a_limit_on_what_is_taken_from_an_upstream_is_kept() {
    let mut kit = Kit::new();
    kit.source.write(100, 1);
    drop(kit.shipped());
    let limit = 400 << 10;
    let mut b = Follower::of(&kit, "b");
    let whole = kit.source.frame_bytes();
    b.wait_for(&kit.source);
    drop(b.server.take());
    // Begins anew, under the limit.
    std::fs::remove_dir_all(b.site.join("agents")).unwrap();
    b.rate = Schedule::new(vec![format!("{limit} B/s").parse().unwrap()]).unwrap();
    let began = std::time::Instant::now();
    b.run();
    b.wait_for(&kit.source);
    let seconds = began.elapsed().as_secs_f64();
    let upstream = status(&b.site).unwrap().upstream.unwrap();
    assert_eq!(upstream.rate_bytes_per_s, Some(limit));
    assert!(whole > 3 * limit, "{whole} bytes are too few to tell");
    // A quarter of a second may go at once, and the last piece.
    let most = limit as f64 * (seconds + 0.25) + f64::from(16 << 10);
    assert!(whole as f64 <= most, "{whole} bytes in {seconds} s");
    kit.source.assert_copied(&b.site);
    b.rate = Schedule::default();
    b.run();
    kit.source.write(100, 2);
    drop(kit.shipped());
    b.wait_for(&kit.source);
    assert_eq!(status(&b.site).unwrap().upstream.unwrap().rate_bytes_per_s, None);
}

/// Goal: two servers that follow each other, and one that follows itself, take nothing from an agent. Method: an agent that
/// ships to one of them, restarted in between.
#[test]
fn servers_that_follow_each_other_do_not_follow_themselves() {
    let mut kit = Kit::new();
    let b = Follower::of(&kit, "b");
    let mut a = Follower {
        site: kit.site(),
        identity: kit.dir.path().join("a-identity"),
        upstream: b.address(),
        writer: WriterOptions::default(),
        rate: Schedule::default(),
        address: Some(kit.address),
        server: None,
    };
    a.enroll("a", &b.site);
    kit.server.take().unwrap().stop();
    a.run();
    kit.source.write(5, 1);
    drop(kit.shipped());
    b.wait_for(&kit.source);
    let told = wait_for_status(&a.site, "a connection", |status| {
        status.upstream.as_ref().unwrap().state == TargetState::Connected
    });
    assert!(!agent(&told, "web01").unwrap().followed, "{told:?}");
    a.run();
    kit.source.write(5, 2);
    drop(kit.shipped());
    b.wait_for(&kit.source);
    kit.source.assert_copied(&b.site);
}
