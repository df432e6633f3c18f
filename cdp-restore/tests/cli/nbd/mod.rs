//! `nbd`: what clients of other makers see, what a layer keeps, and what hostile bytes do not do.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;

use serde_json::Value;

use crate::damage::damage;
use crate::live::files_below;
use crate::program::{programs_for, run, tool};
use crate::store::{BLOCK_BYTES, Store, VOLUME_BYTES, known_image, noise};

mod client;
mod tls;

use client::{
    BLOCK_STATUS, Client, FLUSH, READ, Server, TRIM, WRITE, WRITE_ZEROES, option, option_answer, request,
    take,
};

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;

#[test]
fn nbdinfo_is_told_all_about_the_export() {
    if !programs_for("nbdinfo_is_told_all_about_the_export", &["nbdinfo"]) {
        return;
    }
    let store = Store::known();
    for (more, read_only) in [(&[][..], true), (&["--rw"], false)] {
        let server = Server::start(&store, "seq:6", more);
        let text = tool("nbdinfo", ["--json", &server.uri]);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["protocol"], "newstyle-fixed");
        assert_eq!(value["structured"], true);
        let export = &value["exports"][0];
        assert_eq!(
            (
                &export["export-name"],
                &export["export-size"],
                &export["is_read_only"]
            ),
            (&"pg".into(), &VOLUME_BYTES.into(), &read_only.into()),
            "{text}"
        );
        for flag in ["can_multi_conn", "can_df", "can_flush"] {
            assert_eq!(export[flag], true, "{flag}: {text}");
        }
        for flag in ["can_fua", "can_trim", "can_zero"] {
            assert_eq!(export[flag], !read_only, "{flag}: {text}");
        }
        assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
        assert_eq!(export["block_size_maximum"], 32 << 20);
        let description = export["description"].as_str().unwrap();
        assert!(
            description.contains("pg as it was at 2026-01-02T03:04:09"),
            "{text}"
        );
        let list = tool("nbdinfo", ["--list", "--json", &server.uri]);
        assert!(list.contains("\"export-name\": \"pg\""), "{list}");
    }
}

/// Goal: what a client copies is the moment, byte for byte. Method: nbdcopy on four connections with many requests on
/// their way, and on one with one; every kind of moment.
#[test]
fn nbdcopy_copies_exactly_the_moment() {
    if !programs_for("nbdcopy_copies_exactly_the_moment", &["nbdcopy"]) {
        return;
    }
    let store = Store::known();
    let copy = store.beside("copy.img");
    for seq in [4, 6, 8, 15] {
        let server = Server::start(&store, &format!("seq:{seq}"), &[]);
        for how in [&["--connections=4", "--requests=64"][..], &["--synchronous"]] {
            let _ = fs::remove_file(&copy);
            tool("nbdcopy", [how, &[&server.uri, copy.to_str().unwrap()]].concat());
            assert!(fs::read(&copy).unwrap() == known_image(seq), "seq {seq}, {how:?}");
        }
    }
}

/// Goal: what fio writes through its own engine it reads again, over several connections that see each other's writes.
/// Method: random writes with checksums, several jobs, each verified; the history stays.
#[test]
fn fios_own_engine_reads_what_it_wrote() {
    let name = "fios_own_engine_reads_what_it_wrote";
    if !programs_for(name, &["fio"]) {
        return;
    }
    if !tool("fio", ["--enghelp"]).contains("nbd") {
        crate::program::skip(name, "this fio has no nbd engine");
        return;
    }
    const BLOCKS: u64 = 2048;
    let store = Store::noisy(BLOCKS, "/dev/no-such-device");
    let before = files_below(&store.path());
    let server = Server::start(&store, "latest", &["--rw"]);
    let uri = format!("--uri={}", server.uri);
    let jobs = [
        "--numjobs=4",
        "--size=2M",
        "--offset_increment=2M",
        "--iodepth=16",
    ];
    let load = ["--name=load", "--ioengine=nbd", &uri, "--rw=randrw", "--bs=4k"];
    let verify = [
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--group_reporting",
    ];
    tool("fio", [&load[..], &jobs, &verify].concat());
    let (status, stderr) = server.stop();
    assert!(status.success(), "{stderr}");
    assert_eq!(files_below(&store.path()), before);
}

#[test]
fn qemu_reads_compares_and_maps_it() {
    if !programs_for("qemu_reads_compares_and_maps_it", &["qemu-img"]) {
        return;
    }
    let store = Store::known();
    let server = Server::start(&store, "seq:6", &[]);
    let (image, qcow2) = (store.beside("seq6.img"), store.beside("copy.qcow2"));
    fs::write(&image, known_image(6)).unwrap();
    let (image, qcow2) = (image.to_str().unwrap(), qcow2.to_str().unwrap());
    tool(
        "qemu-img",
        ["compare", "-f", "raw", "-F", "raw", &server.uri, image],
    );
    tool(
        "qemu-img",
        ["convert", "-f", "raw", "-O", "qcow2", &server.uri, qcow2],
    );
    tool("qemu-img", ["compare", "-f", "qcow2", "-F", "raw", qcow2, image]);
    let map = tool("qemu-img", ["map", "-f", "raw", "--output=json", &server.uri]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let told: Vec<_> = map
        .iter()
        .map(|extent| {
            let field = |name: &str| extent[name].as_u64().unwrap() / BLOCK_BYTES as u64;
            (field("start"), field("length"), extent["zero"].as_bool().unwrap())
        })
        .collect();
    assert_eq!(
        told,
        [(0, 2, false), (2, 7, true), (9, 1, false), (10, 246, true)]
    );
}

/// Goal: what is written is what is read, on every connection, and never reaches the history. Method: random writes,
/// trims and zeroes of any length at any offset, on two connections of different kinds, compared with a buffer after
/// each; then nbdcopy's copy of all of it, and the store's files.
#[test]
fn a_layer_keeps_what_is_written_and_history_stays() {
    let store = Store::known();
    let before = files_below(&store.path());
    let seed = std::env::var("CDP_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1u64);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = |bound: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % bound
    };
    let server = Server::start(&store, "seq:6", &["--rw"]);
    let mut clients = [
        Client::new(&server.socket, true),
        Client::new(&server.socket, false),
    ];
    let mut model = known_image(6);
    for step in 0..300 {
        let command = [WRITE, WRITE, TRIM, WRITE_ZEROES][next(4) as usize];
        let longest = [600, 600, 3 * 4096, VOLUME_BYTES][next(4) as usize];
        // Every other one where the volume is not zero.
        let offset = next([VOLUME_BYTES, 11 * BLOCK_BYTES as u64][step % 2]);
        let len = (1 + next(longest)).min(VOLUME_BYTES - offset);
        let (start, end) = (offset as usize, (offset + len) as usize);
        let mut data = Vec::new();
        model[start..end].fill(0);
        if command == WRITE {
            data = (0..len).map(|at| (at as u8) ^ (step as u8) | 1).collect();
            model[start..end].copy_from_slice(&data);
        }
        let fua = next(2) as u16;
        let reply = clients[step / 2 % 2].ask(fua, command, offset, len as u32, &data);
        assert_eq!(reply.errno, 0, "seed {seed}, step {step}");
        let from = next(VOLUME_BYTES);
        let len = (1 + next(longest)).min(VOLUME_BYTES - from);
        let read = clients[(step / 2 + 1) % 2].read(from, len as u32);
        assert!(
            read == model[from as usize..(from + len) as usize],
            "seed {seed}, step {step}: {len} bytes at {from}"
        );
    }
    let whole = clients[0].ask(0, READ, 0, VOLUME_BYTES as u32, &[]);
    assert!(whole.data == model, "seed {seed}");
    // What is told to be a hole is one.
    let status = clients[0].ask(0, BLOCK_STATUS, 0, VOLUME_BYTES as u32, &[]);
    let mut at = 0;
    for (len, flags) in status.extents {
        let end = at + len as usize;
        assert!(
            flags == 0 || model[at..end].iter().all(|byte| *byte == 0),
            "seed {seed}"
        );
        at = end;
    }
    assert_eq!(at, model.len(), "seed {seed}");
    assert_eq!(clients[0].ask(0, FLUSH, 0, 0, &[]).errno, 0);
    drop(clients);
    let (status, stderr) = server.stop();
    assert!(status.success(), "{stderr}");
    assert_eq!(files_below(&store.path()), before);
    assert!(store.image("seq:6").unwrap() == known_image(6));
}

#[test]
fn a_layer_has_a_bound_and_gives_room_back() {
    let store = Store::known();
    let server = Server::start(&store, "seq:6", &["--rw", "--layer-bytes-max", "16KiB"]);
    let mut client = Client::new(&server.socket, false);
    let blocks = |count: usize| vec![7u8; count * BLOCK_BYTES];
    assert_eq!(client.ask(0, WRITE, 8192, 4 * 4096, &blocks(4)).errno, 0);
    assert_eq!(client.ask(0, WRITE, 0, 1, &[9]).errno, ENOSPC);
    assert_eq!(
        client.read(0, 4096),
        known_image(6)[..4096],
        "a refused write changes nothing"
    );
    assert_eq!(
        client.ask(0, WRITE, 12288, 100, &[8; 100]).errno,
        0,
        "it is in the layer already"
    );
    assert_eq!(client.ask(0, TRIM, 8192, 4096, &[]).errno, 0);
    assert_eq!(client.ask(0, WRITE, 0, 1, &[9]).errno, 0);
    assert_eq!(client.read(0, 2), [9, known_image(6)[1]]);
    let (_, stderr) = server.stop();
    assert!(
        stderr.contains("the throw-away layer is full: it holds 16 KiB"),
        "{stderr}"
    );
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let store = Store::known();
    let server = Server::start(&store, "seq:6", &[]);
    let mut client = Client::new(&server.socket, true);
    assert_eq!((client.bytes, client.flags), (VOLUME_BYTES, 0b1_1000_0111));
    assert_eq!(client.ask(0, WRITE, 0, 4096, &[1; 4096]).errno, EPERM);
    assert_eq!(client.ask(0, WRITE, 0, 3 << 20, &vec![1; 3 << 20]).errno, EPERM);
    assert_eq!(client.ask(0, TRIM, 0, 4096, &[]).errno, EPERM);
    assert_eq!(client.ask(0, WRITE_ZEROES, 0, 4096, &[]).errno, EPERM);
    assert!(client.read(0, VOLUME_BYTES as u32) == known_image(6));
}

#[test]
fn requests_that_make_no_sense_are_answered_with_an_error() {
    let store = Store::known();
    let server = Server::start(&store, "seq:6", &["--rw"]);
    for structured in [true, false] {
        let mut client = Client::new(&server.socket, structured);
        for (flags, command, offset, len, errno) in [
            (0, READ, VOLUME_BYTES, 1, EINVAL),
            (0, READ, VOLUME_BYTES - 1, 2, EINVAL),
            (0, READ, u64::MAX, 4096, EINVAL),
            (0, READ, 0, 0, EINVAL),
            (1 << 4, READ, 0, 4096, EINVAL),
            (0, TRIM, u64::MAX, u32::MAX, EINVAL),
            (0, WRITE_ZEROES, VOLUME_BYTES, 4096, ENOSPC),
            (0, FLUSH, 1, 0, EINVAL),
            (0, 5, 0, 4096, EINVAL),
            (0, 999, 0, 4096, EINVAL),
        ] {
            let reply = client.ask(flags, command, offset, len, &[]);
            assert_eq!(
                reply.errno, errno,
                "command {command}, flags {flags}, {len} at {offset}"
            );
        }
        let reply = client.ask(0, WRITE, VOLUME_BYTES - 1, 2, &[1, 2]);
        assert_eq!(reply.errno, ENOSPC);
        // The data of a write that is too long is taken off the connection, which goes on.
        let long = vec![0; (33 << 20) as usize];
        assert!([EOVERFLOW, ENOSPC].contains(&client.ask(0, WRITE, 0, 33 << 20, &long).errno));
        assert_eq!(client.read(9 * 4096, 4096), known_image(6)[9 * 4096..10 * 4096]);
    }
    let mut client = Client::new(&server.socket, true);
    assert_eq!(
        client.ask(1 << 2, READ, 0, VOLUME_BYTES as u32, &[]).chunks,
        1,
        "DF: one piece"
    );
    assert_eq!(
        client
            .ask(1 << 3, BLOCK_STATUS, 0, VOLUME_BYTES as u32, &[])
            .extents,
        [(8192, 0)]
    );
    let mut client = Client::new(&server.socket, false);
    assert_eq!(
        client.ask(0, BLOCK_STATUS, 0, 4096, &[]).errno,
        EINVAL,
        "not agreed on"
    );
}

/// Goal: no client can harm another, whatever it sends. Method: bytes that are not the protocol, lengths that lie,
/// options without end, connections cut at every point; after each, a client that behaves is served.
#[test]
fn hostile_clients_are_left_and_others_served() {
    let store = Store::known();
    let server = Server::start(&store, "seq:6", &[]);
    let hello = 3u32.to_be_bytes().to_vec();
    let go = option(7, b"\0\0\0\x02pg\0\0");
    let mut lying_option = b"IHAVEOPT\0\0\0\x07".to_vec();
    lying_option.extend_from_slice(&u32::MAX.to_be_bytes());
    let mut many_queries = b"\0\0\0\0".to_vec();
    many_queries.extend_from_slice(&u32::MAX.to_be_bytes());
    let hostile: Vec<Vec<u8>> = vec![
        vec![],
        vec![0xff; 4],
        vec![0; 1 << 16],
        [&hello[..], b"IHAVEOPS", &[0; 8]].concat(),
        [&hello[..], &lying_option].concat(),
        [&hello[..], &option(7, b"\xff\xff\xff\xffpg\0\0")].concat(),
        [&hello[..], &option(7, b"\0\0\0\x02pg\xff\xff")].concat(),
        [&hello[..], &option(1, b"another name")].concat(),
        [&hello[..], &option(8, &[]), &option(10, &many_queries)].concat(),
        [&hello[..], &option(3, &[]).repeat(100_000)].concat(),
        [&hello[..], &go, &[0x5a; 100_000]].concat(),
        [&hello[..], &go, &request(0, WRITE, 1, 0, u32::MAX)].concat(),
        [&hello[..], &go, &request(0, READ, 1, 0, u32::MAX).repeat(10_000)].concat(),
        [&hello[..], &go, &request(0, READ, 1, 0, 1 << 20)[..27]].concat(),
    ];
    for (number, bytes) in hostile.iter().enumerate() {
        let mut stream = server.connect();
        // It may have been left before all was said; and who never reads its answers is not heard for ever.
        stream.set_nonblocking(true).unwrap();
        let _ = stream.write_all(bytes);
        drop(stream);
        let mut client = Client::new(&server.socket, true);
        assert!(
            client.read(0, 4096) == known_image(6)[..4096],
            "after number {number}"
        );
    }
    // Options that are unknown or make no sense are answered, and the handshake goes on.
    let mut stream = server.connect();
    let _: [u8; 18] = take(&mut stream);
    stream.write_all(&hello).unwrap();
    for (bytes, kind) in [
        (option(5, &[]), 0x8000_0001),
        (option(11, &[]), 0x8000_0001),
        (option(77, &[1; 1000]), 0x8000_0001),
        (option(3, b"x"), 0x8000_0003),
        (option(8, b"x"), 0x8000_0003),
        (option(7, b"\xff\xff\xff\xff"), 0x8000_0003),
        (option(7, b"\0\0\0\x02ps\0\0"), 0x8000_0006),
        (option(10, b"\0\0\0\0\0\0\0\0"), 0x8000_0003),
        (option(2, &[]), 1),
    ] {
        stream.write_all(&bytes).unwrap();
        assert_eq!(option_answer(&mut stream).0, kind, "{bytes:?}");
    }
    let (status, _) = server.stop();
    assert!(status.success());
}

/// Goal: a client that does not read its answers keeps nobody else waiting. Method: it asks for more than a socket
/// holds, in the one form that must be answered in one piece, hears the beginning and reads no further; another asks for
/// the same.
#[test]
fn a_client_that_does_not_read_keeps_nobody_waiting() {
    const BLOCKS: u64 = 2048;
    let store = Store::noisy(BLOCKS, "/dev/no-such-device");
    let server = Server::start(&store, "latest", &[]);
    let (mut silent, mut other) = (
        Client::new(&server.socket, false),
        Client::new(&server.socket, false),
    );
    let bytes = BLOCKS as u32 * BLOCK_BYTES as u32;
    silent.begin(&request(0, READ, 7, 0, bytes));
    assert_eq!(silent.take::<16>()[8..], 7u64.to_be_bytes());
    let read = other.read(0, bytes);
    let expected: Vec<u8> = (0..BLOCKS).flat_map(|number| noise(number + 100)).collect();
    assert!(read == expected);
    // And it has its own whole, once it does read.
    let mut rest = vec![0; bytes as usize];
    silent.fill(&mut rest);
    assert!(rest == expected);
}

#[test]
fn more_clients_than_the_bound_are_turned_away() {
    let store = Store::known();
    let server = Server::start(&store, "seq:6", &[]);
    let mut clients: Vec<_> = (0..16).map(|_| Client::new(&server.socket, true)).collect();
    let mut more = server.connect();
    assert_eq!(more.read(&mut [0; 18]).unwrap_or(0), 0, "the 17th is left");
    for client in &mut clients {
        assert!(client.read(0, 4096) == known_image(6)[..4096]);
    }
    clients.pop();
    // The server hears of it in its own time.
    let mut hello = [0; 18];
    while server.connect().read(&mut hello).unwrap_or(0) == 0 {}
    assert_eq!(hello, *b"NBDMAGICIHAVEOPT\x00\x03");
}

/// Goal: SIGTERM ends it in good order whoever is connected. Method: clients that wait at every stage.
#[test]
fn sigterm_ends_it_and_leaves_nothing() {
    let store = Store::known();
    let server = Server::start(&store, "seq:6", &["--rw"]);
    let metadata = fs::metadata(&server.socket).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o700, "for its owner only");
    let socket = server.socket.clone();
    let _silent = server.connect();
    let _idle = Client::new(&socket, true);
    let mut half = server.connect();
    half.write_all(&[0, 0]).unwrap();
    let (status, stderr) = server.stop();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(!socket.exists());
    // And one that was killed leaves a name that the next one takes.
    let server = Server::start(&store, "seq:6", &[]);
    drop(server);
    assert!(socket.exists());
    let server = Server::start(&store, "seq:6", &[]);
    Client::new(&server.socket, false);
}

#[test]
fn it_listens_only_where_nobody_else_can_come_in() {
    let store = Store::known();
    let listen = |listen: &str| store.run("nbd", &["pg", "--at", "latest", "--listen", listen]);
    for open in ["0.0.0.0:0", "[::]:0", "192.0.2.1:10809"] {
        listen(open).exits(1).says(&["--tls-certificates", "unix:PATH"]);
    }
    let file = store.beside("file");
    fs::write(&file, "mine").unwrap();
    let says = "is there already";
    listen(&format!("unix:{}", file.display())).exits(1).says(&[says]);
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    let socket = store.beside("alive.sock");
    let _alive = UnixListener::bind(&socket).unwrap();
    listen(&format!("unix:{}", socket.display()))
        .exits(1)
        .says(&[says]);
    run([
        "nbd", "--from", "/tmp", "pg", "--at", "latest", "--listen", "10809",
    ])
    .exits(2);
    let server = Server::started(
        &store,
        &["pg", "--at", "seq:6", "--listen", "127.0.0.1:0"],
        Default::default(),
    );
    assert!(
        server.uri.starts_with("nbd://127.0.0.1:") && server.uri.ends_with("/pg"),
        "{}",
        server.uri
    );
    if programs_for("it_listens_only_where_nobody_else_can_come_in", &["nbdinfo"]) {
        assert_eq!(tool("nbdinfo", ["--size", &server.uri]), VOLUME_BYTES.to_string());
    }
}

#[test]
fn the_layer_may_not_lie_in_the_store() {
    let store = Store::known();
    let (folder, socket) = (store.path(), store.beside("nbd.sock"));
    let listen = format!("unix:{}", socket.display());
    let arguments = ["pg", "--at", "latest", "--listen", &listen, "--rw", "--layer-dir"];
    let ran = store.run("nbd", &[&arguments[..], &[folder.to_str().unwrap()]].concat());
    ran.exits(1).says(&["lies inside the store"]);
}

#[test]
fn damage_is_an_error_to_the_client_and_named_on_stderr() {
    let store = Store::known();
    damage(&store, 5);
    let server = Server::start(&store, "seq:6", &[]);
    for structured in [true, false] {
        let mut client = Client::new(&server.socket, structured);
        assert_eq!(client.ask(0, READ, 0, 4096, &[]).errno, EIO);
        assert_eq!(client.ask(0, READ, 0, VOLUME_BYTES as u32, &[]).errno, EIO);
        assert_eq!(client.read(9 * 4096, 4096), known_image(6)[9 * 4096..10 * 4096]);
    }
    let segment = store.segment();
    let (_, stderr) = server.stop();
    assert!(
        stderr.contains(segment.to_str().unwrap()) && stderr.contains("damaged at byte"),
        "{stderr}"
    );
    assert_eq!(stderr.matches("damaged").count(), 1, "told once: {stderr}");
}
