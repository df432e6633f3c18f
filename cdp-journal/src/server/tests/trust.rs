//! Who is let in, and what the others are told.

use super::*;
use crate::net::{EnrollError, Identities, TargetState};

fn why_refused(kit: &Kit, identity: &Path) -> String {
    let shipper = kit.source.ship(&kit.address.to_string(), identity);
    wait_until("a refusal", || shipper.status().state == TargetState::Refused);
    shipper.status().why.unwrap()
}

#[test]
fn a_client_without_a_certificate_can_do_nothing_but_enroll() {
    let kit = Kit::new();
    let none = kit.dir.path().join("none");
    let why = why_refused(&kit, &none);
    assert!(
        why.contains("no certificate there") && why.contains("enroll"),
        "{why}"
    );
    let why = hostile::talk_without_certificate(&kit, crate::wire::ALPN);
    assert!(why.contains("no certificate was shown"), "{why}");
    let why = hostile::talk_without_certificate(&kit, crate::wire::ALPN_ENROLL);
    assert!(why.contains("Hello") && why.contains("Enroll"), "{why}");
    assert!(
        Site::open(&kit.site())
            .unwrap()
            .unwrap()
            .logs()
            .unwrap()
            .is_empty()
    );
}

#[test]
fn a_certificate_of_another_authority_is_refused_by_both_ends() {
    let kit = Kit::new();
    let other = Kit::new();
    let why = why_refused(&kit, &other.identity());
    assert!(why.contains("another authority"), "{why}");
    let why = hostile::talk_with_foreign_certificate(&kit, &other);
    assert!(why.contains("another authority"), "{why}");
}

#[test]
fn a_token_is_for_its_server_and_works_once() {
    let kit = Kit::new();
    let (other, identity) = (Kit::new(), kit.dir.path().join("new"));
    let token = kit.token("web02", Right::Append, PATIENCE);
    let enroll = |address: SocketAddr, right| {
        crate::net::enroll(&address.to_string(), &token, right, &identity).map(|_| ())
    };
    let error = enroll(other.address, Right::Append).unwrap_err();
    assert!(matches!(error, EnrollError::OtherServer { .. }), "{error}");
    let told = |error: EnrollError| format!("{:#}", anyhow::Error::from(error));
    let error = told(enroll(kit.address, Right::Read).unwrap_err());
    assert!(error.contains("for an agent and not for restores"), "{error}");
    assert!(!identity.exists(), "an empty folder is left");
    enroll(kit.address, Right::Append).unwrap();
    let error = told(enroll(kit.address, Right::Append).unwrap_err());
    assert_eq!(error.matches("used before").count(), 1, "{error}");
    assert!(error.contains("used before"), "{error}");
}

#[test]
fn an_expired_certificate_is_refused_by_both_ends() {
    let kit = Kit::new();
    let identity = kit.dir.path().join("short");
    let token = kit.token("web02", Right::Append, Duration::from_secs(1));
    crate::net::enroll(&kit.address.to_string(), &token, Right::Append, &identity).unwrap();
    let identities = Identities::load(&identity, Right::Append).unwrap();
    wait_until("the certificate to expire", || {
        identities.check(WallNs::now()).is_err()
    });
    let why = why_refused(&kit, &identity);
    assert!(
        why.contains("expired at") && why.contains("enroll again"),
        "{why}"
    );
    let why = hostile::talk(&kit, &identities);
    assert!(why.contains("has expired"), "{why}");
}

#[test]
fn a_revoked_agent_is_cut_off_and_let_in_again_with_a_new_token() {
    let mut kit = Kit::new();
    kit.source.write(3, 1);
    let shipper = kit.shipped();
    Grants::open(&kit.site()).unwrap().revoke(&name("web01")).unwrap();
    wait_until("the connection to be closed", || {
        shipper.status().state == TargetState::Refused
    });
    let why = shipper.status().why.unwrap();
    assert!(why.contains("was revoked"), "{why}");
    kit.source.write(3, 2);
    assert!(!shipper.wait_acked(kit.source.last(), Duration::ZERO));
    kit.enroll("web01", Right::Append, &kit.identity());
    assert!(
        shipper.wait_acked(kit.source.last(), PATIENCE),
        "{:?}",
        shipper.status()
    );
    kit.assert_same();
}

#[test]
fn the_history_of_one_agent_is_not_taken_from_another() {
    let mut kit = Kit::new();
    kit.source.write(3, 1);
    let shipper = kit.shipped();
    drop(shipper);
    let identity = kit.dir.path().join("web02");
    kit.enroll("web02", Right::Append, &identity);
    let why = why_refused(&kit, &identity);
    assert!(
        why.contains("belongs to agent web01") && why.contains("is for agent web02"),
        "{why}"
    );
    kit.assert_same();
}

#[test]
fn a_key_that_others_can_read_is_not_used() {
    use std::os::unix::fs::PermissionsExt;
    let kit = Kit::new();
    for entry in std::fs::read_dir(kit.identity()).unwrap() {
        let path = entry.unwrap().path();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    }
    let why = why_refused(&kit, &kit.identity());
    assert!(why.contains("chmod 600"), "{why}");
}
