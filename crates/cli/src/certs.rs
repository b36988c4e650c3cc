//! `pacs certs`: makes a private certificate authority and a certificate for each role.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pacs_runtime::Exit;
use pacs_runtime::net::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, PeerRole, Security};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use crate::arguments::Certs;
use crate::failure::Failure;
use crate::output;

/// File of the authority's private key, in the folder `ca`. Whoever reads it can sign certificates that the run trusts.
const CA_KEY_FILE: &str = "ca.key";

/// Validity of the authority's own certificate.
const CA_LIFE: Duration = Duration::days(3650);

/// `--if-missing` renews certificates that expire within this time.
const STALE: std::time::Duration = DAY.saturating_mul(3);

/// One day; lifetimes of certificates are multiples of it.
pub(crate) const DAY: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// Clock skew allowed between machines: certificates become valid this long before they are made.
const SKEW: Duration = Duration::hours(1);

pub(crate) fn run(arguments: &Certs) -> Result<Exit, Failure> {
    let folder = &arguments.folder;
    if let (Some(role), Some(output)) = (arguments.join, &arguments.output) {
        join(folder, role, arguments.hours, output)
            .map_err(|error| Failure::config(error).doing(format!("make `{}`", output.display())))?;
        output::line(format_args!(
            "wrote {0}, good for {1} h: start the {role} with --tls-dir {0}, and remove the file afterwards",
            output.display(),
            arguments.hours
        ));
        return Ok(Exit::Done);
    }
    if arguments.forget_authority {
        forget(folder)
            .map_err(|error| Failure::config(error).doing(format!("forget the authority of `{}`", folder.display())))?;
    }
    if arguments.if_missing && is_complete(folder, STALE) {
        return Ok(Exit::Done);
    }
    let made = match arguments.forget_authority {
        true => issue(folder, DAY * arguments.days),
        false => make(folder, arguments.days),
    };
    made.map_err(|error| Failure::config(error).doing(format!("make certificates in `{}`", folder.display())))?;
    let roles = PeerRole::ALL.map(PeerRole::name).join(", ");
    output::line(format_args!(
        "wrote {}/{{{roles}}}: {}, {} and {} each",
        folder.display(),
        CA_FILE,
        CERTIFICATE_FILE,
        KEY_FILE
    ));
    let authority = match arguments.forget_authority {
        true => "the authority's key was not kept: nothing there signs new certificates".to_owned(),
        false => format!("{}/ca/{CA_KEY_FILE} signs new certificates: keep it off the cluster", folder.display()),
    };
    output::line(format_args!(
        "give a process its role's folder only, or --tls-dir {} to all where they share one user; {authority}",
        folder.display(),
    ));
    Ok(Exit::Done)
}

/// Returns whether every role has a certificate that is valid for longer than `left`.
pub(crate) fn is_complete(folder: &Path, left: std::time::Duration) -> bool {
    PeerRole::ALL.iter().all(|role| {
        let folder = folder.join(role.name());
        Security::mutual(&folder, *role).is_ok_and(|security| security.valid_for() > Some(left))
    })
}

fn make(folder: &Path, days: u32) -> Result<()> {
    let path = folder.join("ca");
    create_folder(&path)?;
    if !path.join(CA_KEY_FILE).exists() {
        write(&path.join(CA_KEY_FILE), &KeyPair::generate()?.serialize_pem(), 0o600)?;
    }
    let key = authority_key(folder)?;
    if !path.join(CA_FILE).exists() {
        write(&path.join(CA_FILE), &authority_params(CA_LIFE)?.self_signed(&key)?.pem(), 0o644)?;
    }
    let certificate = authority_certificate(folder)?;
    sign(folder, &certificate, &Issuer::new(authority_params(CA_LIFE)?, key), Duration::days(i64::from(days)))
}

/// Makes certificates for all roles, signed by a new authority whose key is dropped and never written. So neither a reader of the
/// folder nor a child of a worker can sign another certificate. Each call makes a new authority.
///
/// Running processes keep working: they read the folder again for every new connection, and earlier authorities stay trusted
/// while certificates that they signed may be in use.
pub(crate) fn issue(folder: &Path, life: std::time::Duration) -> Result<()> {
    let life = Duration::try_from(life)?;
    let key = KeyPair::generate()?;
    let params = authority_params(life)?;
    let mut trusted = params.self_signed(&key)?.pem();
    earlier_authorities(folder).iter().for_each(|authority| trusted.push_str(authority));
    sign(folder, &trusted, &Issuer::new(params, key), life)
}

/// Removes the authority's key if an earlier call wrote one.
fn forget(folder: &Path) -> Result<()> {
    let key = folder.join("ca").join(CA_KEY_FILE);
    match fs::remove_file(&key) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove `{}`", key.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Returns earlier authorities that running processes may still present certificates of, newest first.
fn earlier_authorities(folder: &Path) -> Vec<String> {
    const END: &str = "-----END CERTIFICATE-----\n";
    // Two, not one: when a call was killed between its writes, some roles still have certificates of the authority before the last.
    const MOST: usize = 2;
    let text = fs::read_to_string(folder.join(PeerRole::Coordinator.name()).join(CA_FILE)).unwrap_or_default();
    text.split_inclusive(END).filter(|block| block.ends_with(END)).take(MOST).map(str::to_owned).collect()
}

/// Writes each role's certificate and key, and the authorities that it trusts.
fn sign(folder: &Path, trusted: &str, issuer: &Issuer<'_, KeyPair>, life: Duration) -> Result<()> {
    let folders = PeerRole::ALL.map(|role| (role, folder.join(role.name())));
    // Trust first: every role must trust the new authority before any role presents a certificate that it signed.
    for (_, folder) in &folders {
        create_folder(folder)?;
        write(&folder.join(CA_FILE), trusted, 0o644)?;
    }
    for (role, folder) in &folders {
        let key = KeyPair::generate()?;
        let signed = role_params(*role, life)?.signed_by(&key, issuer)?;
        // The key first: a process that reads between the two writes finds a mismatched pair and keeps its old one.
        write(&folder.join(KEY_FILE), &key.serialize_pem(), 0o600)?;
        write(&folder.join(CERTIFICATE_FILE), &signed.pem(), 0o644)?;
    }
    Ok(())
}

/// Writes one PEM file with which a process of `role` can join: its certificate, the authority's, then the key, as the loader
/// expects them.
fn join(folder: &Path, role: PeerRole, hours: u32, output: &Path) -> Result<()> {
    let issuer = Issuer::new(authority_params(CA_LIFE)?, authority_key(folder)?);
    let key = KeyPair::generate()?;
    let signed = role_params(role, Duration::hours(i64::from(hours)))?.signed_by(&key, &issuer)?;
    let authority = authority_certificate(folder)?;
    write(output, &format!("{}{authority}{}", signed.pem(), key.serialize_pem()), 0o600)
}

fn authority_key(folder: &Path) -> Result<KeyPair> {
    let path = folder.join("ca").join(CA_KEY_FILE);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("read `{}` (`pacs certs DIR` makes an authority)", path.display()))?;
    // The parser's error is dropped, because it may quote the file, which is secret.
    KeyPair::from_pem(&text).map_err(|_| anyhow::anyhow!("`{}` holds no private key (PEM)", path.display()))
}

fn authority_certificate(folder: &Path) -> Result<String> {
    let path = folder.join("ca").join(CA_FILE);
    fs::read_to_string(&path).with_context(|| format!("read `{}`", path.display()))
}

/// Returns parameters that are always the same except for the dates, so a later call can sign with the key alone.
fn authority_params(life: Duration) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, "PACS authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    valid_for(&mut params, life);
    Ok(params)
}

fn role_params(role: PeerRole, life: Duration) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(vec![role.dns_name().to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, format!("PACS {role}"));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Both usages, because a role may be both ends: learners dial the coordinator and serve weights.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, life);
    Ok(params)
}

fn valid_for(params: &mut CertificateParams, life: Duration) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - SKEW;
    params.not_after = now + life;
}

/// Creates a folder with mode 0700, because it will hold private keys.
pub(crate) fn create_folder(path: &Path) -> Result<()> {
    let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
    created.with_context(|| format!("create folder `{}`", path.display()))
}

/// Writes a file atomically; its permissions are never wider than `mode`, not even for a moment.
fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let unfinished: PathBuf = path.with_extension("part");
    let written = || -> io::Result<()> {
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        // `create_new`, because a file left from an earlier try could have wider permissions.
        let mut file = File::options().write(true).create_new(true).mode(mode).open(&unfinished)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    written().with_context(|| format!("write `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use pacs_runtime::launch::security;
    use pacs_runtime::net::TlsError;

    use super::*;

    fn arguments(folder: &Path, if_missing: bool) -> Certs {
        let folder = folder.to_owned();
        Certs { folder, days: 30, if_missing, forget_authority: false, join: None, hours: 24, output: None }
    }

    fn certs(folder: &Path, if_missing: bool) {
        let arguments = arguments(folder, if_missing);
        assert_eq!(run(&arguments).expect("made"), Exit::Done);
    }

    #[test]
    fn every_role_can_use_its_own_and_no_other() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        certs(dir.path(), false);
        for role in PeerRole::ALL {
            assert!(security(dir.path(), role).is_ok(), "{role}");
            for other in PeerRole::ALL.into_iter().filter(|other| *other != role) {
                let error = Security::mutual(&dir.path().join(other.name()), role).expect_err("another role's");
                assert!(matches!(error, TlsError::Role { .. }), "{error}");
            }
        }
    }

    #[test]
    fn one_file_lets_one_role_join() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("join.pem");
        let join = |folder: &Path| {
            let (join, output) = (Some(PeerRole::Rollout), Some(file.clone()));
            run(&Certs { join, hours: 2, output, ..arguments(folder, false) })
        };
        let error = join(&dir.path().join("elsewhere")).expect_err("there is no authority");
        assert!(error.to_string().contains("makes an authority"), "{error}");
        certs(dir.path(), false);
        assert_eq!(join(dir.path()).expect("made"), Exit::Done);
        assert!(security(&file, PeerRole::Rollout).is_ok());
        assert!(matches!(security(&file, PeerRole::Learner), Err(TlsError::Role { .. })));
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o604)).expect("set");
        assert!(matches!(security(&file, PeerRole::Rollout), Err(TlsError::Exposed { .. })));
    }

    #[test]
    fn a_certificate_that_no_peer_would_take_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        certs(dir.path(), false);
        let folder = dir.path().join("learner");
        let left = Security::mutual(&folder, PeerRole::Learner).expect("good").valid_for().expect("not plain");
        assert!(left.as_secs().abs_diff(30 * 24 * 3600) < 60, "{left:?}");

        let issuer = Issuer::new(authority_params(CA_LIFE).expect("made"), authority_key(dir.path()).expect("there"));
        let key = KeyPair::from_pem(&fs::read_to_string(folder.join(KEY_FILE)).expect("there")).expect("a key");
        let mut params = role_params(PeerRole::Learner, Duration::seconds(-1)).expect("made");
        params.not_before -= SKEW;
        let expired = params.signed_by(&key, &issuer).expect("signed");
        write(&folder.join(CERTIFICATE_FILE), &expired.pem(), 0o644).expect("written");
        let error = Security::mutual(&folder, PeerRole::Learner).expect_err("expired");
        assert!(matches!(error, TlsError::Refused { .. }) && error.to_string().contains("expired"), "{error}");
        certs(dir.path(), true);
        assert!(Security::mutual(&folder, PeerRole::Learner).is_ok(), "made again");

        let other = tempfile::tempdir().expect("a temporary folder");
        certs(other.path(), false);
        fs::copy(other.path().join("ca/ca.crt"), folder.join(CA_FILE)).expect("copied");
        let error = Security::mutual(&folder, PeerRole::Learner).expect_err("of another authority");
        assert!(matches!(error, TlsError::Refused { .. }), "{error}");
    }

    #[test]
    fn keys_are_for_their_owner_only() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        certs(dir.path(), false);
        for key in ["ca/ca.key", "learner/tls.key"] {
            let mode = fs::metadata(dir.path().join(key)).expect("written").mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
        let folder = dir.path().join("learner");
        fs::set_permissions(folder.join(KEY_FILE), std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("set");
        let error = Security::mutual(&folder, PeerRole::Learner).expect_err("exposed");
        assert!(matches!(error, TlsError::Exposed { mode: 0o644, .. }), "{error}");
    }

    #[test]
    fn no_error_about_a_key_quotes_it() {
        const SECRET: &str = "c2VjcmV0LW9mLXRoZS1rZXk";
        let dir = tempfile::tempdir().expect("a temporary folder");
        certs(dir.path(), false);
        let folder = dir.path().join("learner");
        let end = "-----END PRIVATE KEY-----";
        for text in [
            SECRET.to_owned(),
            format!("-----BEGIN PRIVATE KEY-----\n{SECRET}\n{end}\n"),
            format!("-----BEGIN PRIVATE KEY-----\n{SECRET}!\n{end}\n"),
            format!("-----BEGIN {SECRET}-----\n{SECRET}\n{end}\n"),
            format!("-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END {SECRET}-----\n"),
        ] {
            write(&folder.join(KEY_FILE), &text, 0o600).expect("written");
            let error = Security::mutual(&folder, PeerRole::Learner).expect_err(&text);
            for said in [error.to_string(), format!("{error:?}")] {
                assert!(said.contains(KEY_FILE) || said.contains(CERTIFICATE_FILE), "{said}");
                assert!(!said.contains(SECRET) && !said.contains(&SECRET[..8]), "{said}");
            }
        }
    }

    #[test]
    fn a_pair_that_does_not_fit_leaves_the_old_one_in_use() {
        let (dir, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        certs(dir.path(), false);
        certs(other.path(), false);
        let folder = dir.path().join("learner");
        let security = Security::mutual(&folder, PeerRole::Learner).expect("good");
        let client = || security.rustls().expect("not plain").0;
        let before = client();
        let (key, foreign) = (folder.join(KEY_FILE), other.path().join("learner").join(KEY_FILE));
        let own = fs::read_to_string(&key).expect("written");
        write(&key, &fs::read_to_string(foreign).expect("written"), 0o600).expect("written");
        assert!(std::sync::Arc::ptr_eq(&before, &client()) && security.valid_for() > Some(std::time::Duration::ZERO));
        write(&key, &own, 0o600).expect("written");
        assert!(!std::sync::Arc::ptr_eq(&before, &client()), "read again");
    }

    #[test]
    fn an_authority_is_forgotten_when_asked() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        certs(dir.path(), false);
        let read = || fs::read_to_string(dir.path().join("learner/tls.crt")).expect("written");
        let (key, before) = (dir.path().join("ca").join(CA_KEY_FILE), read());
        let forget = |if_missing| {
            let arguments = Certs { forget_authority: true, ..arguments(dir.path(), if_missing) };
            assert_eq!(run(&arguments).expect("done"), Exit::Done);
            assert!(!key.exists());
        };
        assert!(key.exists());
        forget(true);
        assert_eq!(read(), before, "what it has signed is good");
        forget(false);
        assert_ne!(read(), before);
        for role in PeerRole::ALL {
            assert!(security(dir.path(), role).is_ok(), "{role}");
        }
    }

    #[test]
    fn a_second_call_keeps_the_authority() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let read = |file: &str| fs::read_to_string(dir.path().join(file)).expect("written");
        certs(dir.path(), false);
        let (authority, certificate) = (read("ca/ca.crt"), read("learner/tls.crt"));
        certs(dir.path(), true);
        assert_eq!(read("learner/tls.crt"), certificate);
        certs(dir.path(), false);
        assert_ne!(read("learner/tls.crt"), certificate);
        assert_eq!((read("ca/ca.crt"), read("rollout/ca.crt")), (authority.clone(), authority));
    }
}
