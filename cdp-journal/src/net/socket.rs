//! The UDP socket under QUIC.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, ServerConfig, TokioRuntime, UdpPoller};
use rustix::net::sockopt;

/// What the kernel may hold for us each way, where it lets us: what comes while this process does not run is lost
/// beyond it, and is taken for a congested line.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Payload of a datagram at most, where the line takes so much (loopback, jumbo frames): found by probing from 1200 bytes on
/// (RFC 8899). quinn hands ten at a time to the kernel, which takes 64 KiB.
pub(crate) const DATAGRAM_BYTES_MAX: u16 = 6500;

/// What the kernel hands over at once, datagrams of one sender in a row, is at most this long (udp(7), UDP_GRO).
const RECEIVED_BYTES_MAX: usize = 64 << 10;

const _: () = assert!(DATAGRAM_BYTES_MAX as usize * 10 < RECEIVED_BYTES_MAX);

/// An endpoint at this address; one of clients without `server`.
pub(crate) fn endpoint(
    address: SocketAddr,
    mut config: EndpointConfig,
    server: Option<ServerConfig>,
) -> io::Result<Endpoint> {
    config
        .max_udp_payload_size(DATAGRAM_BYTES_MAX)
        .map_err(io::Error::other)?;
    let runtime = Arc::new(TokioRuntime);
    let socket = Arc::new(Socket(runtime.wrap_udp_socket(bind(address)?)?));
    Endpoint::new_with_abstract_socket(config, server, socket, runtime)
}

fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(address)?;
    // Without the right to go beyond the system's bound there is as much as that allows.
    let _ = sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES));
    let _ = sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)
        .or_else(|_| sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES));
    Ok(socket)
}

/// A socket that asks for no more memory than the kernel can fill. quinn makes room for 32 times as many of the largest
/// datagrams as may come at once: 13 MB for each endpoint, by what quinn's own socket says (64).
#[derive(Debug)]
struct Socket(Arc<dyn AsyncUdpSocket>);

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.0).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        self.0.try_send(transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context,
        buffers: &mut [IoSliceMut<'_>],
        received: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_recv(context, buffers, received)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.max_transmit_segments()
    }

    /// Of the largest datagrams. Of smaller ones there may be more, which are no longer together.
    fn max_receive_segments(&self) -> usize {
        let fit = RECEIVED_BYTES_MAX.div_ceil(usize::from(DATAGRAM_BYTES_MAX));
        self.0.max_receive_segments().min(fit)
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}
