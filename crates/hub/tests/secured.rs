//! The hub over TLS and through a proxy, as most clusters see it.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pacs_hub::{Hub, HubError, Patience, Settings, Token};
use pacs_spec::HubData;
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use support::HubServer;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// A name that only the proxy knows.
const HOST: &str = "hub.test";

/// Ends TLS before the server. Returns where, and the certificate as PEM.
async fn tls(server: &HubServer) -> (SocketAddr, String) {
    let made = rcgen::generate_simple_self_signed(vec![HOST.to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let (acceptor, upstream) = (TlsAcceptor::from(Arc::new(config)), server.address);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut secured = acceptor.accept(stream).await?;
                let mut plain = TcpStream::connect(upstream).await?;
                copy_bidirectional(&mut secured, &mut plain).await
            });
        }
    });
    (address, made.cert.pem())
}

/// A proxy that connects to `target`, whatever name it is asked for; one without the right user is refused. Returns where, and the
/// requests that arrive.
async fn proxy(target: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, seen) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
    let own = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let own = Arc::clone(&own);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await?);
                }
                let head = String::from_utf8(head).unwrap();
                own.lock().unwrap().push(head.clone());
                // `me@x:pass` as users of HTTP are written.
                if !head.contains("Proxy-Authorization: Basic bWVAeDpwYXNz\r\n") {
                    stream.write_all(b"HTTP/1.1 407 No\r\n\r\n").await?;
                    return Ok(());
                }
                stream.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await?;
                let mut upstream = TcpStream::connect(target).await?;
                copy_bidirectional(&mut stream, &mut upstream).await.map(drop)
            });
        }
    });
    (address, seen)
}

fn settings(cache: PathBuf, proxy: String, authorities: Option<PathBuf>) -> Settings {
    let seconds = Duration::from_secs(20);
    Settings {
        endpoint: format!("https://{HOST}"),
        cache,
        token: Token::new("hf_secret"),
        offline: false,
        proxy: Some(proxy),
        no_proxy: Vec::new(),
        authorities,
        patience: Patience {
            connect: seconds,
            answer: seconds,
            silence: seconds,
            tries: 1,
            pause: Duration::ZERO,
            lock: seconds,
        },
    }
}

#[tokio::test]
async fn the_hub_is_reached_through_a_proxy_and_its_certificate_is_verified() {
    let server = HubServer::start();
    server.require_token("hf_secret");
    server.commit("datasets/o/sums", &[("train.jsonl", b"{\"question\": \"1 + 1?\", \"answer\": 2}")]);
    let (secured, pem) = tls(&server).await;
    let (proxy, seen) = proxy(secured).await;
    let folder = tempfile::tempdir().unwrap();
    let authorities = folder.path().join("authorities.pem");
    std::fs::write(&authorities, pem).unwrap();
    let data: HubData = "hf://datasets/o/sums/train".parse().unwrap();
    let fetch = async |user: &str, authorities: Option<PathBuf>| {
        let settings = settings(folder.path().join("hub"), format!("http://{user}{proxy}"), authorities);
        let hub = Hub::new(settings).unwrap();
        hub.data(&data, None, &mut |_| {}, &mut |_| {}).await
    };
    let unknown = fetch("me%40x:pass@", None).await.unwrap_err();
    assert!(matches!(&unknown, HubError::Unreachable { reason, .. } if reason.contains("certificate")), "{unknown}");
    let refused = fetch("", Some(authorities.clone())).await.unwrap_err().to_string();
    assert!(refused.contains("HTTPS_PROXY") && refused.contains("407"), "{refused}");
    let (path, _) = fetch("me%40x:pass@", Some(authorities)).await.unwrap();
    assert!(path.is_file());
    let heads = seen.lock().unwrap();
    assert!(heads.iter().all(|head| head.starts_with("CONNECT hub.test:443 HTTP/1.1\r\n")), "{heads:?}");
    assert!(heads.iter().all(|head| !head.contains("hf_secret")), "the proxy never sees the token");
}
