//! The UDP socket under QUIC.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use quinn::EndpointConfig;
use rustix::net::sockopt;

/// What the kernel may hold for us each way, where it lets us: what comes while this process does not run is lost
/// beyond it, and is taken for a congested line.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Payload of a datagram at most, where the line takes so much (loopback, jumbo frames): found by probing from 1200 bytes on
/// (RFC 8899). quinn hands ten at a time to the kernel, which takes 64 KiB.
pub(crate) const DATAGRAM_BYTES_MAX: u16 = 6500;

const _: () = assert!(DATAGRAM_BYTES_MAX as usize * 10 < 64 << 10);

/// Takes datagrams as large as we send.
pub(crate) fn take_large(config: &mut EndpointConfig) -> io::Result<()> {
    let taken = config.max_udp_payload_size(DATAGRAM_BYTES_MAX);
    taken.map(drop).map_err(io::Error::other)
}

/// A socket of this address.
pub(crate) fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(address)?;
    // Without the right to go beyond the system's bound there is as much as that allows.
    let _ = sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES));
    let _ = sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)
        .or_else(|_| sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES));
    Ok(socket)
}
