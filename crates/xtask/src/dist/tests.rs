use std::process::{Command, Output};

use super::*;

#[test]
fn the_oldest_glibc_that_will_do_is_that_of_the_newest_symbol() {
    let text = "  0x0010:   Name: GLIBC_2.2.5  Flags: none\n  0x0020:   Name: GLIBC_2.34  Flags: none\n\
                0x0030: Name: GLIBCXX_3.4.29\n  0x0040:   Name: GLIBC_2.9\n  0x0050: Name: GLIBC_PRIVATE";
    assert_eq!(newest_glibc(text), Some((2, 34)));
    assert_eq!(newest_glibc("Name: CXXABI_1.3"), None);
}

#[test]
fn equal_contents_make_equal_archives() {
    let folder = tempfile::tempdir().expect("a folder");
    let make = |name: &str, order: [&str; 2]| {
        let parts = folder.path().join(name);
        fs::create_dir_all(parts.join("bin")).expect("created");
        for file in order {
            write(&parts.join("bin").join(file), file).expect("written");
        }
        let archive = folder.path().join(format!("{name}.tar.gz"));
        pack(&parts, "pacs-1", &archive).expect("packed");
        archive
    };
    let one = make("one", ["a", "b"]);
    // Another name of the folder, another order, another time.
    let two = make("two", ["b", "a"]);
    let mut touch = Command::new("touch");
    assert!(touch.args(["-d", "2001-02-03"]).arg(folder.path().join("two/bin/a")).status().expect("touch").success());
    pack(&folder.path().join("two"), "pacs-1", &two).expect("packed");
    assert_eq!(fs::read(&one).expect("read"), fs::read(&two).expect("read"));
    let listed = Command::new("tar").arg("-tzf").arg(&one).output().expect("tar").stdout;
    assert_eq!(String::from_utf8_lossy(&listed), "pacs-1/\npacs-1/bin/\npacs-1/bin/a\npacs-1/bin/b\n");
    let (digest, bytes) = sign(&one).expect("signed");
    assert_eq!((digest.len(), bytes), (64, fs::metadata(&one).expect("there").len()));
    let mut check = Command::new("sha256sum");
    let status = check.args(["--check", "--status", "one.tar.gz.sha256"]).current_dir(&folder).status();
    assert!(status.expect("sha256sum").success());
}

#[test]
fn packed_files_exist_and_need_no_caches() {
    let folder = tempfile::tempdir().expect("a folder");
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    fs::create_dir_all(from.join("deep/__pycache__")).expect("created");
    for name in ["deep/a.py", "deep/__pycache__/a.pyc", "b"] {
        write(&from.join(name), name).expect("written");
    }
    copy(&from, &to).expect("copied");
    assert_eq!(files(&to).expect("listed"), ["b", "deep/a.py"]);
    for name in FOLDERS.iter().chain(&FILES) {
        assert!(root().join(name).exists(), "{name}");
    }
}

/// An installation with a worker that prints where it looks for libraries.
struct Installation(tempfile::TempDir);

impl Installation {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["bin", "libexec", "empty"] {
            fs::create_dir(folder.path().join(name)).expect("created");
        }
        let installation = Self(folder);
        installation.program("bin/pacs-worker", &filled(START_SCRIPT));
        installation.program("libexec/pacs-worker", "#!/bin/sh\necho \"$LD_LIBRARY_PATH $*\"\n");
        installation
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn program(&self, name: &str, text: &str) {
        write(&self.path(name), text).expect("written");
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).expect("executable");
    }

    /// Puts a package torch, without anything but what tells it from others, into a folder.
    fn torch(&self, folder: &str, version: &str) {
        let torch = self.path(folder).join("torch");
        fs::create_dir_all(torch.join("lib")).expect("created");
        for (name, text) in [
            ("lib/libtorch_cpu.so", ""),
            ("__init__.py", "raise RuntimeError('it takes seconds to import torch')\n"),
            ("version.py", &format!("from typing import Optional\n__all__ = ['debug']\n__version__ = '{version}'\n")),
        ] {
            write(&torch.join(name), text).expect("written");
        }
    }

    /// Starts the worker with these variables and a search path without anything of Rust.
    fn start(&self, variables: &[(&str, &Path)]) -> (Option<i32>, String) {
        let mut command = Command::new(self.path("bin/pacs-worker"));
        command.args(["bench", "train"]).env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin");
        command.envs(variables.iter().copied()).current_dir(self.path("empty"));
        // A script that was just written may still be open in a child of another test's thread.
        let Output { status, stdout, stderr } = loop {
            match command.output() {
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                output => break output.expect("started"),
            }
        };
        (status.code(), [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat())
    }
}

/// The Python of this machine, whose own packages must not matter: it sees those of `PYTHONPATH` first.
fn python() -> PathBuf {
    let output = command("python3").args(["-c", "import sys; print(sys.executable)"]).output().expect("python3");
    String::from_utf8(output.stdout).expect("a path").trim().into()
}

#[test]
fn the_worker_starts_with_the_torch_of_its_python() {
    let (installation, python) = (Installation::new(), python());
    for version in [setup::TORCH_VERSION.to_owned(), format!("{}+cpu", setup::TORCH_VERSION)] {
        installation.torch("site", &version);
        let site = installation.path("site");
        let (code, said) = installation.start(&[("PACS_PYTHON", &python), ("PYTHONPATH", &site)]);
        let expected = format!("{} bench train\n", site.join("torch/lib").display());
        assert_eq!((code, said), (Some(0), expected));
    }
    let libraries = Path::new("/opt/cuda/lib64");
    let variables =
        [("PACS_PYTHON", &*python), ("PYTHONPATH", &installation.path("site")), ("LD_LIBRARY_PATH", libraries)];
    let (_, said) = installation.start(&variables);
    assert!(said.contains("torch/lib:/opt/cuda/lib64 "), "{said}");
}

#[test]
fn the_nearest_libtorch_comes_first() {
    let (installation, python) = (Installation::new(), python());
    let variables = [("PACS_PYTHON", &*python), ("PYTHONPATH", &installation.path("site"))];
    for folder in ["site", "libtorch", "own"] {
        installation.torch(folder, setup::TORCH_VERSION);
    }
    let (_, said) = installation.start(&variables);
    assert!(said.contains("/libtorch/torch/lib "), "{said}");
    let own = installation.path("own/torch");
    let (_, said) = installation.start(&[&variables[..], &[("LIBTORCH", &own)]].concat());
    assert!(said.contains("/own/torch/lib "), "{said}");
}

#[test]
fn a_worker_without_its_torch_says_what_to_install() {
    let (installation, python) = (Installation::new(), python());
    let refused = |variables: &[(&str, &Path)], expected: &[&str]| {
        let (code, said) = installation.start(variables);
        let is_said = expected.iter().all(|part| said.contains(part)) && said.lines().count() == 2;
        assert!(code == Some(78) && is_said, "{code:?}, {expected:?}: {said}");
    };
    let install = &format!("-m pip install torch=={}", setup::TORCH_VERSION);
    let (bad, site) = (Path::new("/no/such/python"), installation.path("site"));
    refused(&[("PACS_PYTHON", bad)], &["there is no program /no/such/python", "let PACS_PYTHON name"]);
    refused(&[("PACS_PYTHON", Path::new("/bin/false"))], &["cannot be asked", "let PACS_PYTHON name"]);
    // `-S`: the machine's Python may have a torch of its own.
    installation.program("bare", &format!("#!/bin/sh\nexec {} -S \"$@\"\n", python.display()));
    let bare = installation.path("bare");
    refused(&[("PACS_PYTHON", &bare)], &["has no package torch", install]);
    // A folder of that name is no package.
    fs::create_dir_all(installation.path("empty/torch/lib")).expect("created");
    refused(&[("PACS_PYTHON", &bare)], &["has no package torch", install]);
    installation.torch("site", "2.10.0+cu128");
    refused(&[("PACS_PYTHON", &bare), ("PYTHONPATH", &site)], &["is 2.10.0+cu128, and this program needs", install]);
    installation.torch("site", &format!("{}1", setup::TORCH_VERSION));
    refused(&[("PACS_PYTHON", &bare), ("PYTHONPATH", &site)], &["and this program needs", install]);
    fs::remove_file(installation.path("site/torch/lib/libtorch_cpu.so")).expect("removed");
    refused(&[("PACS_PYTHON", &bare), ("PYTHONPATH", &site)], &["has no lib/libtorch_cpu.so", install]);
    refused(&[("LIBTORCH", Path::new("/no/libtorch"))], &["LIBTORCH is /no/libtorch", "unset it"]);
}
