//! `pacs certs`: an authority of one's own, and a certificate for each role.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pacs_runtime::Exit;
use pacs_runtime::net::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, PeerRole};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use crate::arguments::Certs;
use crate::failure::Failure;
use crate::output;

/// The authority's key, in the folder `ca`: what it signs is trusted.
const CA_KEY_FILE: &str = "ca.key";

/// How long the authority's own certificate is valid.
const CA_DAYS: i64 = 3650;

/// Clocks of a cluster may differ by this much.
const SKEW: Duration = Duration::hours(1);

pub(crate) fn run(arguments: &Certs) -> Result<Exit, Failure> {
    let folder = &arguments.folder;
    if arguments.if_missing && is_complete(folder) {
        return Ok(Exit::Done);
    }
    make(folder, arguments.days)
        .map_err(|error| Failure::config(error).doing(format!("make certificates in `{}`", folder.display())))?;
    let roles = PeerRole::ALL.map(PeerRole::name).join(", ");
    output::line(format_args!(
        "wrote {}/{{{roles}}}: {}, {} and {} each",
        folder.display(),
        CA_FILE,
        CERTIFICATE_FILE,
        KEY_FILE
    ));
    output::line(format_args!(
        "give a process its role's folder only, or --tls-dir {} to all where they share one user; {}/ca/{} signs new \
         certificates: keep it off the cluster",
        folder.display(),
        folder.display(),
        CA_KEY_FILE
    ));
    Ok(Exit::Done)
}

/// Whether a call would have nothing to add.
fn is_complete(folder: &Path) -> bool {
    PeerRole::ALL.iter().all(|role| {
        [CA_FILE, CERTIFICATE_FILE, KEY_FILE].iter().all(|file| folder.join(role.name()).join(file).exists())
    })
}

fn make(folder: &Path, days: u32) -> Result<()> {
    let authority = folder.join("ca");
    create_folder(&authority)?;
    let (key_path, certificate_path) = (authority.join(CA_KEY_FILE), authority.join(CA_FILE));
    let key = match fs::read_to_string(&key_path) {
        // The parser's message may quote the file, and this file is secret.
        Ok(text) => KeyPair::from_pem(&text)
            .map_err(|_| anyhow::anyhow!("`{}` holds no private key (PEM)", key_path.display()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = KeyPair::generate()?;
            write(&key_path, &key.serialize_pem(), 0o600)?;
            key
        }
        Err(error) => return Err(error).with_context(|| format!("read `{}`", key_path.display())),
    };
    if !certificate_path.exists() {
        write(&certificate_path, &authority_params()?.self_signed(&key)?.pem(), 0o644)?;
    }
    let certificate =
        fs::read_to_string(&certificate_path).with_context(|| format!("read `{}`", certificate_path.display()))?;
    let issuer = Issuer::new(authority_params()?, key);
    for role in PeerRole::ALL {
        let folder = folder.join(role.name());
        create_folder(&folder)?;
        let key = KeyPair::generate()?;
        let signed = role_params(role, days)?.signed_by(&key, &issuer)?;
        // The key first: a process that reads between the two writes finds a pair that does not fit, and keeps the old one.
        write(&folder.join(KEY_FILE), &key.serialize_pem(), 0o600)?;
        write(&folder.join(CERTIFICATE_FILE), &signed.pem(), 0o644)?;
        write(&folder.join(CA_FILE), &certificate, 0o644)?;
    }
    Ok(())
}

/// Always the same but for the dates, so that the key alone is enough to sign again.
fn authority_params() -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, "PACS authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    valid_for(&mut params, CA_DAYS);
    Ok(params)
}

fn role_params(role: PeerRole, days: u32) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(vec![role.dns_name().to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, format!("PACS {role}"));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Learners serve weights, all but the operator may be called one day: both ends use the same certificate.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, i64::from(days));
    Ok(params)
}

fn valid_for(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - SKEW;
    params.not_after = now + Duration::days(days);
}

/// For its owner only: there are keys in it.
fn create_folder(path: &Path) -> Result<()> {
    let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
    created.with_context(|| format!("create folder `{}`", path.display()))
}

/// Writes all or nothing, and never wider open than `mode`.
fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let unfinished: PathBuf = path.with_extension("part");
    let written = || -> io::Result<()> {
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
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
    use pacs_runtime::net::{Security, TlsError};

    use super::*;

    fn certs(folder: &Path, if_missing: bool) {
        let arguments = Certs { folder: folder.to_owned(), days: 30, if_missing };
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
