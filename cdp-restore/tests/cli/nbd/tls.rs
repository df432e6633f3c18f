//! `nbd` under TLS: clients of other makers with a certificate are served, and nobody else is told anything.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

use super::client::{Server, option, option_answer, take};
use crate::program::{programs_for, tool};
use crate::store::{BLOCK_BYTES, Store, VOLUME_BYTES, known_image, noise};

const LIST: u32 = 3;
const STARTTLS: u32 = 5;
const GO: u32 = 7;
const ERR_TLS_REQD: u32 = (1 << 31) + 5;
const ACK: u32 = 1;

/// A folder with what a server and its clients need, as nbdkit and libnbd take it.
fn certificates(store: &Store, name: &str) -> PathBuf {
    let folder = store.beside(name);
    fs::create_dir(&folder).unwrap();
    let write = |name: &str, pem: String| fs::write(folder.join(name), pem).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    write("ca-cert.pem", params.self_signed(&key).unwrap().pem());
    let authority = Issuer::new(params, key);
    for (name, purpose) in [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        write(&format!("{name}-cert.pem"), certificate.pem());
        write(&format!("{name}-key.pem"), key.serialize_pem());
    }
    folder
}

fn serve(store: &Store, listen: &str, certificates: &Path, more: &[&str]) -> Server {
    let folder = certificates.to_str().unwrap();
    let arguments = [
        "pg",
        "--at",
        "seq:6",
        "--listen",
        listen,
        "--tls-certificates",
        folder,
    ];
    Server::started(store, &[&arguments[..], more].concat(), PathBuf::new())
}

/// The address with which a client that has `certificates` comes to the server.
fn uri(server: &Server, certificates: &Path) -> String {
    let port = port(server);
    format!(
        "nbds://localhost:{port}/pg?tls-certificates={}",
        certificates.display()
    )
}

fn port(server: &Server) -> u16 {
    let address = server.uri.strip_prefix("nbds://").unwrap();
    let port = address.strip_suffix("/pg").unwrap().rsplit_once(':').unwrap().1;
    port.parse().unwrap()
}

/// Goal: who has a certificate reads the moment, over an address that others can reach. Method: nbdinfo, nbdcopy on
/// several connections and qemu-img, with certificates of one authority; and what nbdcopy writes is what it reads.
#[test]
fn clients_with_a_certificate_read_the_moment_under_tls() {
    let name = "clients_with_a_certificate_read_the_moment_under_tls";
    if !programs_for(name, &["nbdinfo", "nbdcopy", "qemu-img"]) {
        return;
    }
    let store = Store::known();
    let folder = certificates(&store, "pki");
    let server = serve(&store, "0.0.0.0:0", &folder, &[]);
    let uri = uri(&server, &folder);
    let told = tool("nbdinfo", ["--json", &uri]);
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["TLS"], true, "{told:#}");
    assert_eq!(
        (&told["structured"], &told["exports"][0]["export-size"]),
        (&true.into(), &VOLUME_BYTES.into())
    );
    let copy = store.beside("copy.img");
    tool(
        "nbdcopy",
        ["--connections=4", "--requests=16", &uri, copy.to_str().unwrap()],
    );
    assert!(fs::read(&copy).unwrap() == known_image(6));
    let image = format!(
        "driver=nbd,host=localhost,port={},export=pg,tls-creds=tls,tls-hostname=localhost",
        port(&server)
    );
    let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", folder.display());
    let raw = format!("driver=raw,file.driver=file,file.filename={}", copy.display());
    tool(
        "qemu-img",
        ["compare", "--object", &credentials, "--image-opts", &image, &raw],
    );
    drop(server);
    // The other way: more at once than one record holds.
    let noise: Vec<u8> = (0..VOLUME_BYTES / BLOCK_BYTES as u64).flat_map(noise).collect();
    let written = store.beside("written.img");
    fs::write(&written, &noise).unwrap();
    let server = serve(&store, "127.0.0.1:0", &folder, &["--rw"]);
    let uri = self::uri(&server, &folder);
    tool("nbdcopy", ["--connections=2", written.to_str().unwrap(), &uri]);
    fs::remove_file(&copy).unwrap();
    tool("nbdcopy", [&uri, copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap() == noise);
}

/// Goal: nobody else is served, nor told what there is. Method: no certificate, one of another authority, no TLS at all,
/// options before TLS.
#[test]
fn clients_without_a_certificate_are_told_nothing() {
    let name = "clients_without_a_certificate_are_told_nothing";
    if !programs_for(name, &["nbdinfo"]) {
        return;
    }
    let store = Store::known();
    let (folder, other) = (certificates(&store, "pki"), certificates(&store, "other"));
    let server = serve(&store, "127.0.0.1:0", &folder, &[]);
    // Of another authority, which the server's own is not checked against.
    let half = store.beside("half");
    fs::create_dir(&half).unwrap();
    fs::copy(folder.join("ca-cert.pem"), half.join("ca-cert.pem")).unwrap();
    let without = uri(&server, &half);
    for name in ["client-cert.pem", "client-key.pem"] {
        fs::copy(other.join(name), half.join(name)).unwrap();
    }
    for (what, uri) in [
        ("of another authority", without.clone()),
        ("of a server that is not known", uri(&server, &other)),
        ("in the clear", format!("nbd://localhost:{}/pg", port(&server))),
    ] {
        refused(what, &uri);
    }
    for name in ["client-cert.pem", "client-key.pem"] {
        fs::remove_file(half.join(name)).unwrap();
    }
    refused("without a certificate", &without);
    // What a client asks before there is TLS is not answered, and it may ask for TLS still.
    let mut stream = TcpStream::connect(("127.0.0.1", port(&server))).unwrap();
    take::<18>(&mut stream);
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    let mut ask = |number, data| {
        stream.write_all(&option(number, data)).unwrap();
        option_answer(&mut stream)
    };
    for (number, data) in [(LIST, &b""[..]), (GO, &[0, 0, 0, 0, 0, 0])] {
        assert_eq!(ask(number, data).0, ERR_TLS_REQD);
    }
    assert_eq!(ask(STARTTLS, b""), (ACK, Vec::new()));
    // The server is there still for those who may.
    let size = tool("nbdinfo", ["--size", &uri(&server, &folder)]);
    assert_eq!(size, VOLUME_BYTES.to_string());
}

fn refused(what: &str, uri: &str) {
    let output: Output = Command::new("nbdinfo").args(["--size", uri]).output().unwrap();
    assert!(!output.status.success(), "{what}: {output:?}");
}

#[test]
fn certificates_that_are_missing_are_named() {
    let store = Store::known();
    let folder = certificates(&store, "pki");
    let listen = || {
        let arguments = ["pg", "--at", "latest", "--listen", "127.0.0.1:0"];
        let more = ["--tls-certificates", folder.to_str().unwrap()];
        store.run("nbd", &[&arguments[..], &more].concat())
    };
    fs::remove_file(folder.join("server-key.pem")).unwrap();
    listen().exits(1).says(&["server-key.pem"]);
    fs::write(folder.join("ca-cert.pem"), "nothing").unwrap();
    listen().exits(1).says(&["ca-cert.pem", "no certificate"]);
}
