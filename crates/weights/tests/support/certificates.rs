//! Certificates of one authority for all roles, as `pacs certs` makes them; tests of `pacs-broadcast` include this file, too.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use pacs_runtime::net::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, PeerRole};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

/// Makes a folder for each role in `place`, named after it.
pub(crate) fn make(place: &Path) {
    let key = KeyPair::generate().expect("a key");
    let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = authority.self_signed(&key).expect("signed");
    let issuer = Issuer::new(authority, key);
    for role in PeerRole::ALL {
        let key = KeyPair::generate().expect("a key");
        let mut own = CertificateParams::new(vec![role.dns_name().to_owned()]).expect("parameters");
        own.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let own = own.signed_by(&key, &issuer).expect("signed");
        let folder = place.join(role.name());
        std::fs::create_dir(&folder).expect("created");
        std::fs::write(folder.join(CA_FILE), ca.pem()).expect("written");
        std::fs::write(folder.join(CERTIFICATE_FILE), own.pem()).expect("written");
        let path = folder.join(KEY_FILE);
        std::fs::write(&path, key.serialize_pem()).expect("written");
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("ours");
    }
}
