//! The Python wheel: the files of the archive in the places of an environment.
//!
//! Python packages are found by name in one folder of an environment, so torch is found there, whoever installed it and
//! whether it computes on CPUs or GPUs. `pacs` and `pacs-worker` of the environment are a few lines of Python that replace
//! themselves by the programs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::{Parts, TIME, WORKER, digest, files, filled, write};
use crate::process::{check, command};

/// The module that starts the programs.
const MODULE: &str = include_str!("__init__.py");

/// Writes the zip file, in the order of the names that it is given: that of the file system would differ.
const ZIP: &str = r#"
import os, sys, time, zipfile
folder, target, seconds, *names = sys.argv[1:]
moment = time.gmtime(int(seconds))[:6]
with zipfile.ZipFile(target, "w") as wheel:
    for name in names:
        path = os.path.join(folder, name)
        info = zipfile.ZipInfo(name, moment)
        info.create_system = 3
        info.external_attr = (0o100755 if os.access(path, os.X_OK) else 0o100644) << 16
        with open(path, "rb") as file:
            wheel.writestr(info, file.read(), zipfile.ZIP_DEFLATED, 6)
"#;

/// Files of the archive that are part of the module, and those that go to `share/pacs` of the environment.
const OF_MODULE: [&str; 2] = ["bin/", "libexec/"];
const SHARED: [&str; 2] = ["deploy/", "proto/"];
const LICENCES: [&str; 2] = ["LICENSE", "THIRD_PARTY_LICENSES.txt"];

pub(super) fn make(parts: &Parts, out: &Path) -> Result<PathBuf> {
    let version = env!("CARGO_PKG_VERSION");
    let (major, minor) = parts.glibc;
    let tag = format!("py3-none-manylinux_{major}_{minor}_{}", std::env::consts::ARCH);
    let folder = out.join("wheel");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("remove the old {}", folder.display()))?;
    }
    let info = format!("pacs-{version}.dist-info");
    for name in files(&parts.folder)? {
        let Some(placed) = place(&name, version, &info) else { continue };
        let target = folder.join(&placed);
        create_above(&target)?;
        fs::copy(parts.folder.join(&name), &target).with_context(|| format!("copy {name}"))?;
    }
    let texts = [
        ("pacs/__init__.py".to_owned(), MODULE.to_owned()),
        (format!("{info}/METADATA"), metadata(version)),
        (
            format!("{info}/WHEEL"),
            format!("Wheel-Version: 1.0\nGenerator: cargo xtask dist\nRoot-Is-Purelib: false\nTag: {tag}\n"),
        ),
        (
            format!("{info}/entry_points.txt"),
            format!("[console_scripts]\npacs = pacs:control\n{WORKER} = pacs:worker\n"),
        ),
    ];
    for (name, text) in texts {
        let target = folder.join(name);
        create_above(&target)?;
        write(&target, &text)?;
    }
    let mut names = files(&folder)?;
    let record = format!("{info}/RECORD");
    write(&folder.join(&record), &record_of(&folder, &names, &record)?)?;
    // Archives of this format end with their description.
    names.push(record);
    let wheel = out.join(format!("pacs-{version}-{tag}.whl"));
    let mut zip = command("python3");
    zip.args(["-c", ZIP]).arg(&folder).arg(&wheel).arg(TIME.to_string()).args(&names);
    check("pack the wheel", &mut zip)?;
    fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    Ok(wheel)
}

/// Where a file of the archive is in the wheel; `None` leaves it out.
fn place(name: &str, version: &str, info: &str) -> Option<String> {
    let is_in = |folders: [&str; 2]| folders.iter().any(|folder| name.starts_with(folder));
    if is_in(OF_MODULE) {
        Some(format!("pacs/{name}"))
    } else if is_in(SHARED) {
        Some(format!("pacs-{version}.data/data/share/pacs/{name}"))
    } else {
        LICENCES.contains(&name).then(|| format!("{info}/licenses/{name}"))
    }
}

fn create_above(path: &Path) -> Result<()> {
    let folder = path.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))
}

/// The requirement on torch lets pip refuse or replace another version; the start script checks it again, because packages
/// are installed and removed later, too.
fn metadata(version: &str) -> String {
    let licences = LICENCES.map(|name| format!("License-File: {name}\n")).concat();
    let head = format!(
        "Metadata-Version: 2.4\nName: pacs\nVersion: {version}\n\
         Summary: Trains language models on problems whose answers can be verified (RLVR)\n\
         License-Expression: Apache-2.0\n{licences}Requires-Python: >=3.10\nRequires-Dist: torch==@TORCH@\n\
         Description-Content-Type: text/markdown\n\n"
    );
    filled(&(head + super::README))
}

/// The wheel's list of files with their digests; its own line has none.
fn record_of(folder: &Path, names: &[String], record: &str) -> Result<String> {
    let mut text = String::new();
    for name in names {
        let (digest, bytes) = digest(&folder.join(name))?;
        text.push_str(&format!("{name},sha256={},{bytes}\n", URL_SAFE_NO_PAD.encode(digest.as_ref())));
    }
    text.push_str(&format!("{record},,\n"));
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_has_its_place() {
        let place = |name| place(name, "1.2.3", "pacs-1.2.3.dist-info");
        assert_eq!(place("bin/pacs-worker").as_deref(), Some("pacs/bin/pacs-worker"));
        assert_eq!(place("libexec/pacs-worker").as_deref(), Some("pacs/libexec/pacs-worker"));
        assert_eq!(
            place("deploy/jobs/demo.toml").as_deref(),
            Some("pacs-1.2.3.data/data/share/pacs/deploy/jobs/demo.toml")
        );
        assert_eq!(place("LICENSE").as_deref(), Some("pacs-1.2.3.dist-info/licenses/LICENSE"));
        assert_eq!(place("README.md"), None);
    }

    #[test]
    fn the_record_lists_digests() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("a"), "abc").expect("written");
        let record = record_of(folder.path(), &["a".to_owned()], "RECORD").expect("read");
        // The digest of FIPS 180-2, in the alphabet of URLs.
        assert_eq!(record, "a,sha256=ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0,3\nRECORD,,\n");
    }

    #[test]
    fn the_wheel_asks_for_the_torch_that_the_programs_were_built_with() {
        let metadata = metadata("1.2.3");
        let torch = crate::setup::TORCH_VERSION;
        assert!(metadata.contains(&format!("\nRequires-Dist: torch=={torch}\n")), "{metadata}");
        assert!(metadata.contains("\nLicense-File: LICENSE\n") && !metadata.contains('@'), "{metadata}");
    }
}
