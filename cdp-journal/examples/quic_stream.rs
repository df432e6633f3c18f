//! How many bytes each second one QUIC stream carries on this machine's loopback, with nothing at either end: what
//! shipping is measured against.
//!
//! ```text
//! quic_stream BYTES MTU_MAX WINDOW_BYTES    prints bytes/s
//! ```

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use quinn::{Endpoint, EndpointConfig, MtuDiscoveryConfig, TokioRuntime, TransportConfig, VarInt};
use rustix::net::sockopt;
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

const NAME: &str = "localhost";
/// Written at once.
const PIECE_BYTES: usize = 1 << 20;
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

#[derive(Clone, Copy)]
struct Plan {
    bytes: u64,
    mtu_max: u16,
    window_bytes: u32,
}

impl Plan {
    fn transport(self) -> Arc<TransportConfig> {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.mtu_max);
        let mut transport = TransportConfig::default();
        transport
            .mtu_discovery_config(Some(discovery))
            .stream_receive_window(VarInt::from_u32(self.window_bytes))
            .receive_window(VarInt::from_u32(self.window_bytes))
            .send_window(u64::from(self.window_bytes));
        Arc::new(transport)
    }

    fn endpoint(self, server: Option<quinn::ServerConfig>) -> Result<Endpoint> {
        let mut config = EndpointConfig::default();
        config.max_udp_payload_size(self.mtu_max)?;
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let _ = sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES);
        let _ = sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER_BYTES);
        Ok(Endpoint::new(config, server, socket, Arc::new(TokioRuntime))?)
    }
}

/// Reads one stream to its end.
async fn receive(endpoint: Endpoint) -> Result<u64> {
    let connection = endpoint.accept().await.context("a connection")?.await?;
    let mut stream = connection.accept_uni().await?;
    let mut bytes = 0;
    while let Some(piece) = stream.read_chunk(PIECE_BYTES, true).await? {
        bytes += piece.bytes.len() as u64;
    }
    connection.close(0_u32.into(), b"all");
    endpoint.wait_idle().await;
    Ok(bytes)
}

async fn send(plan: Plan, address: SocketAddr, roots: RootCertStore) -> Result<f64> {
    let mut config = quinn::ClientConfig::with_root_certificates(Arc::new(roots))?;
    config.transport_config(plan.transport());
    let endpoint = plan.endpoint(None)?;
    let connection = endpoint.connect_with(config, address, NAME)?.await?;
    let piece = vec![0x5a; PIECE_BYTES];
    let started = Instant::now();
    let mut stream = connection.open_uni().await?;
    for _ in 0..plan.bytes / PIECE_BYTES as u64 {
        stream.write_all(&piece).await?;
    }
    stream.finish()?;
    connection.closed().await;
    Ok(plan.bytes as f64 / started.elapsed().as_secs_f64())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

fn main() -> Result<()> {
    let mut numbers = std::env::args().skip(1).map(|argument| argument.parse::<u64>());
    let mut next = || {
        numbers
            .next()
            .context("quic_stream BYTES MTU_MAX WINDOW_BYTES")?
            .context("a number")
    };
    let plan = Plan {
        bytes: next()?,
        mtu_max: next()?.try_into()?,
        window_bytes: next()?.try_into()?,
    };
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let certificate: CertificateDer<'static> = made.cert.der().clone();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let mut server = quinn::ServerConfig::with_single_cert(vec![certificate.clone()], key)?;
    server.transport_config(plan.transport());
    let (tell, told) = std::sync::mpsc::channel();
    let receiver = std::thread::spawn(move || {
        runtime()?.block_on(async {
            let endpoint = plan.endpoint(Some(server))?;
            tell.send(endpoint.local_addr()?)?;
            receive(endpoint).await
        })
    });
    let mut roots = RootCertStore::empty();
    roots.add(certificate)?;
    let rate = runtime()?.block_on(send(plan, told.recv()?, roots))?;
    let received = receiver
        .join()
        .map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
    anyhow::ensure!(received == plan.bytes, "{received} of {} bytes came", plan.bytes);
    println!("{rate:.0}");
    Ok(())
}
