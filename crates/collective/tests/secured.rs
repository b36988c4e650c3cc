//! A ring of ranks that know each other by certificates.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pacs_collective::{
    AbortHandle, Collective, CollectiveError, CredentialSource, Credentials, GroupConfig, HostCollective, HostListener,
};
use pacs_types::Generation;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

const PATIENT: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_secs(3);
const RANK: &str = "rank.test";

/// Who signs certificates.
struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// Credentials of a process with this name, which trusts this authority.
    fn source(&self, name: &str) -> CredentialSource {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let (chain, key) = (vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let roots = Arc::new(roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(chain.clone(), key.clone_key())
            .unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
        let (client, server) = (Arc::new(client), Arc::new(server));
        let name = ServerName::try_from(RANK).unwrap();
        Arc::new(move || Credentials {
            client: Arc::clone(&client),
            server: Arc::clone(&server),
            name: name.clone(),
            judge,
        })
    }
}

/// A certificate holds its name as plain bytes.
fn judge(certificate: &CertificateDer<'_>) -> Result<(), String> {
    let is_rank = certificate.windows(RANK.len()).any(|bytes| bytes == RANK.as_bytes());
    is_rank.then_some(()).ok_or_else(|| "it is no rank".to_owned())
}

fn listener(source: Option<CredentialSource>) -> HostListener {
    let listener = HostListener::bind("127.0.0.1:0").unwrap();
    match source {
        Some(source) => listener.with_credentials(source),
        None => listener,
    }
}

/// Connects a ring and runs `body` on every rank.
fn ring<T: Send>(
    listeners: &[HostListener],
    timeout: Duration,
    body: impl Fn(Result<HostCollective, CollectiveError>) -> T + Sync,
) -> Vec<T> {
    let addresses: Vec<String> = listeners.iter().map(|listener| listener.address().to_string()).collect();
    thread::scope(|scope| {
        let (addresses, body) = (&addresses, &body);
        let ranks: Vec<_> = (0..listeners.len())
            .map(|rank| {
                let (job, generation, addresses) = ("a".to_owned(), Generation(1), addresses.clone());
                let group = GroupConfig { job, generation, rank, addresses, timeout };
                scope.spawn(move || body(HostCollective::connect(&listeners[rank], group)))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// What a rank has after some of everything, long messages and empty ones included.
fn work(ring: Result<HostCollective, CollectiveError>) -> Vec<f32> {
    let mut ring = ring.unwrap();
    let rank = ring.rank();
    let mut all = Vec::new();
    for elements in [0, 1, 1000, 3_000_001] {
        let mut data: Vec<f32> = (0..elements).map(|i| ((i * 7 + rank * 13) % 1000) as f32 / 3.0).collect();
        ring.all_reduce_sum(&mut data).unwrap();
        ring.barrier().unwrap();
        all.extend(data);
    }
    let mut bytes = vec![rank as u8; 1 << 20];
    ring.broadcast(1, &mut bytes).unwrap();
    all.extend(bytes.iter().map(|byte| f32::from(*byte)));
    all
}

#[test]
fn a_secured_ring_computes_what_a_plain_one_does() {
    let authority = Authority::new();
    for world_size in [2, 3] {
        let plain: Vec<HostListener> = (0..world_size).map(|_| listener(None)).collect();
        let secured: Vec<HostListener> = (0..world_size).map(|_| listener(Some(authority.source(RANK)))).collect();
        let (plain, secured) = (ring(&plain, PATIENT, work), ring(&secured, PATIENT, work));
        assert!(plain == secured, "{world_size} ranks");
    }
}

#[test]
fn a_process_that_is_no_rank_is_refused() {
    let authority = Authority::new();
    let rank = || listener(Some(authority.source(RANK)));
    let strangers = [
        ("another authority's", listener(Some(Authority::new().source(RANK)))),
        ("of another role", listener(Some(authority.source("verifier.test")))),
        ("plain", listener(None)),
    ];
    for (what, stranger) in strangers {
        // The stranger dials rank 0, and rank 1 dials the stranger.
        let listeners = [rank(), rank(), stranger];
        for (place, joined) in ring(&listeners, SHORT, |joined| joined.err()).into_iter().enumerate() {
            let error = joined.unwrap_or_else(|| panic!("{what}: rank {place} got into the ring"));
            assert!(error.to_string().contains("waiting for"), "{what}: {error}");
        }
    }
}

#[test]
fn a_lost_rank_and_an_abort_end_a_secured_operation_at_once() {
    let authority = Authority::new();
    let listeners: Vec<HostListener> = (0..3).map(|_| listener(Some(authority.source(RANK)))).collect();
    let started = Instant::now();
    let errors = ring(&listeners, PATIENT, |ring| {
        let mut ring = ring.unwrap();
        // Rank 2 leaves in the middle.
        if ring.rank() == 2 {
            return None;
        }
        let mut data = vec![1.0; 10_000_000];
        ring.all_reduce_sum(&mut data).err()
    });
    assert!(errors[0].is_some() && errors[1].is_some() && errors[2].is_none(), "{errors:?}");

    let aborts = ring(&listeners, PATIENT, |ring| {
        let mut ring = ring.unwrap();
        let abort: AbortHandle = ring.abort_handle();
        if ring.rank() == 0 {
            abort.abort("the test says so");
        }
        ring.barrier().err()
    });
    assert!(aborts.iter().all(Option::is_some), "{aborts:?}");
    assert!(started.elapsed() < PATIENT, "nobody waited for a deadline");
}
