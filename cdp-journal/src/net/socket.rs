//! The UDP socket under QUIC.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use rustix::net::sockopt;

/// What the kernel may hold for us each way, where it lets us: what comes while this process does not run is lost
/// beyond it, and is taken for a congested line.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

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
