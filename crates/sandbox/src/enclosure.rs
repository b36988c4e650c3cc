//! The layers of a sandbox around a program that stays, such as a verifier of a user's own.
//!
//! A [`Sandbox`](crate::Sandbox) forks a process for each job. A program that loads its libraries once and then answers for hours cannot be
//! forked like that, so the layers surround its whole life: a text that takes it over gains no more than that. It takes two processes, because a
//! pid namespace holds for the children of the process that makes it: [`Enclosure::isolate`] is called in the first one, and
//! [`Isolated::lock`] in the second one, which then executes the program.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use caps::CapSet;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    Scope, path_beneath_rules,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::unistd::{chdir, geteuid};
use serde::{Deserialize, Serialize};

use crate::interpreter::{Interpreter, SYSTEM};
use crate::{Layer, filter, init};

/// What programs of a system read, beside the libraries: interpreters, their modules, and the links between their versions.
const PROGRAMS: [&str; 5] = ["/usr", "/bin", "/sbin", "/etc/alternatives", "/etc/localtime"];

/// Where the scratch folder may be; nothing that is shown may be within.
const SCRATCH: [&str; 3] = ["/tmp", "/var/tmp", "/scratch"];

/// Newest version of landlock that is made use of; an older kernel enforces what it knows.
const LANDLOCK: ABI = ABI::V6;

/// A program that is enclosed for all of its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enclosure {
    /// Files and folders that it may read and execute, besides the system's programs and libraries and what its command names.
    pub paths: Vec<PathBuf>,
    /// Size of the folder that it may write to, which is memory.
    pub scratch_bytes: u64,
    /// Layers that may be missing.
    pub allow_missing: Vec<Layer>,
}

/// What became of the first step; it travels to the process of the second one as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Isolated {
    missing: BTreeMap<Layer, String>,
    allow_missing: Vec<Layer>,
    readable: Vec<PathBuf>,
    /// File of the program.
    program: PathBuf,
    scratch: PathBuf,
    scratch_bytes: u64,
    /// Where relative paths of the command begin.
    folder: PathBuf,
}

/// Where things are in the sandbox that the process is in.
#[derive(Clone, Debug)]
pub struct Enclosed {
    /// File to execute in place of the first word of the command. A script that chooses an interpreter (a shim of a version manager)
    /// does not work without the files that it looks at; what it has chosen does.
    pub program: PathBuf,
    /// The one folder that can be written to.
    pub scratch: PathBuf,
}

impl Enclosure {
    /// The layers of an enclosure: all but the control group. What the processes take together is bounded by their number times what
    /// each may take.
    pub const LAYERS: [Layer; 11] = [
        Layer::User,
        Layer::Mount,
        Layer::Pid,
        Layer::Net,
        Layer::Ipc,
        Layer::Uts,
        Layer::NoNewPrivs,
        Layer::Capabilities,
        Layer::Landlock,
        Layer::Seccomp,
        Layer::Rlimits,
    ];

    /// First step: namespaces for the children of this process, and a root that shows no more than `command` needs. This process has to
    /// have one thread. `executable` is the program of the second step.
    ///
    /// # Errors
    /// Why the root cannot be what it has to be; a namespace that is refused is a missing layer, about which the second step decides.
    pub fn isolate(&self, executable: &Path, command: &[OsString]) -> Result<Isolated, String> {
        if let Some(path) = self.paths.iter().find(|path| !path.exists()) {
            return Err(format!("`{}`, which the program is to read, is not there", path.display()));
        }
        let folder = std::env::current_dir().map_err(|error| format!("find the working directory: {error}"))?;
        let mut paths: BTreeSet<PathBuf> = SYSTEM.iter().chain(&PROGRAMS).map(PathBuf::from).collect();
        paths.insert(executable.to_owned());
        paths.extend(self.paths.iter().cloned());
        let [program, arguments @ ..] = command else { return Err("there is no program to execute".to_owned()) };
        let (program, parts) = parts_of(Path::new(program), &folder)?;
        paths.extend(parts);
        paths.extend(arguments.iter().flat_map(|argument| named(Path::new(argument), &folder)));
        // Rights on a file are asked for by its name, and a link that leads out of the view leads nowhere.
        let targets: Vec<PathBuf> = paths.iter().filter_map(|path| path.canonicalize().ok()).collect();
        paths.extend(targets);
        let is_free = |place: &&&str| !paths.iter().any(|path| path.starts_with(place));
        let scratch = PathBuf::from(SCRATCH.iter().find(is_free).ok_or("there is no place for a scratch folder")?);
        let mut missing = BTreeMap::new();
        if geteuid().is_root() {
            init::isolate_root(&paths, &scratch, &mut missing)?;
        } else {
            init::isolate_user(&paths, &scratch, &mut missing);
        }
        let readable = match missing.contains_key(&Layer::Mount) {
            true => paths.into_iter().filter(|path| path.exists()).collect(),
            false => vec![PathBuf::from("/")],
        };
        let Self { scratch_bytes, allow_missing, .. } = self.clone();
        Ok(Isolated { missing, allow_missing, readable, program, scratch, scratch_bytes, folder })
    }
}

/// Makes one layer hold for this process, or says why it does not.
type Step = fn(&Isolated) -> Result<(), String>;

impl Isolated {
    /// Second step: a private scratch folder, and the layers that hold for this process and whatever it executes. Its limits
    /// ([`Layer::Rlimits`]) have been set before.
    ///
    /// # Errors
    /// Layers that do not hold and may not be missing.
    pub fn lock(mut self) -> Result<Enclosed, String> {
        if !self.missing.contains_key(&Layer::Mount)
            && let Err(problem) = self.mount_scratch()
        {
            self.missing.insert(Layer::Mount, problem);
        }
        // A folder that the view does not show: relative paths lead nowhere, then.
        if chdir(&self.folder).is_err() {
            chdir("/").map_err(|error| format!("enter the root: {}", error.desc()))?;
        }
        let steps: [(Layer, Step); 4] = [
            (Layer::NoNewPrivs, |_| prctl::set_no_new_privs().map_err(|error| error.desc().to_owned())),
            (Layer::Landlock, Self::restrict),
            (Layer::Capabilities, Self::drop_capabilities),
            (Layer::Seccomp, |_| filter::apply()),
        ];
        for (layer, step) in steps {
            if let Err(problem) = step(&self) {
                self.missing.insert(layer, problem);
            }
        }
        let refused: Vec<_> = self.missing.iter().filter(|(layer, _)| !self.allow_missing.contains(layer)).collect();
        if refused.is_empty() {
            return Ok(Enclosed { program: self.program, scratch: self.scratch });
        }
        let reasons: Vec<_> =
            refused.iter().map(|(layer, why)| format!("layer `{layer}` is missing ({why})")).collect();
        let names: Vec<_> = refused.iter().map(|(layer, _)| format!("\"{layer}\"")).collect();
        Err(format!("{}; to run without, list {} in `sandbox.allow_missing`", reasons.join(", "), names.join(", ")))
    }

    /// The one folder that can be written to. The mount namespace is one of the user namespace, in which this process may mount.
    fn mount_scratch(&self) -> Result<(), String> {
        const NONE: Option<&str> = None;
        let said = |error: nix::Error| format!("make a scratch folder: {}", error.desc());
        unshare(CloneFlags::CLONE_NEWNS).map_err(said)?;
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).map_err(said)?;
        let options = format!("mode=0700,nr_inodes=4096,size={}", self.scratch_bytes);
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), &self.scratch, Some("tmpfs"), flags, Some(options.as_str())).map_err(said)
    }

    fn restrict(&self) -> Result<(), String> {
        let has_scratch = !self.missing.contains_key(&Layer::Mount);
        let enforced = || {
            let ruleset = Ruleset::default()
                .set_compatibility(CompatLevel::BestEffort)
                .handle_access(AccessFs::from_all(LANDLOCK))?
                .handle_access(AccessNet::from_all(LANDLOCK))?
                .scope(Scope::from_all(LANDLOCK))?
                .create()?
                .add_rules(path_beneath_rules(&self.readable, AccessFs::from_read(LANDLOCK)))?
                .add_rules(path_beneath_rules(["/dev/null"], AccessFs::from_file(LANDLOCK)))?;
            let scratch = has_scratch.then_some(&self.scratch);
            let devices = AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::MakeSock | AccessFs::IoctlDev;
            ruleset.add_rules(path_beneath_rules(scratch, AccessFs::from_all(LANDLOCK) & !devices))?.restrict_self()
        };
        let status = enforced().map_err(|error: landlock::RulesetError| error.to_string())?;
        match status.ruleset {
            RulesetStatus::NotEnforced => Err("the kernel has no landlock".to_owned()),
            RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
        }
    }

    fn drop_capabilities(&self) -> Result<(), String> {
        // Only the privileges of a user namespace let it drop what nobody within could have.
        let bounding = (!self.missing.contains_key(&Layer::User) || geteuid().is_root()).then_some(CapSet::Bounding);
        let own = [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted];
        bounding.into_iter().chain(own).try_for_each(|set| caps::clear(None, set).map_err(|error| error.to_string()))
    }
}

/// The file of a program, and what else it consists of: the environment of packages that it is in, and the parts of an interpreter.
fn parts_of(program: &Path, folder: &Path) -> Result<(PathBuf, BTreeSet<PathBuf>), String> {
    let found = match program.components().count() {
        1 => on_path(program),
        _ => Some(folder.join(program)),
    };
    let found = found.ok_or_else(|| format!("`{}` is in no folder of PATH", program.display()))?;
    let is_python = found.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"python"));
    let interpreter = if is_python { Some(Interpreter::ask(&found)?) } else { None };
    // The folder `bin` of a virtual environment of Python is beside its packages.
    let environment = found.ancestors().nth(2).filter(|root| root.join("pyvenv.cfg").exists()).map(Path::to_owned);
    let file = match &interpreter {
        Some(interpreter) if environment.is_none() => interpreter.executable.clone(),
        _ => found.clone(),
    };
    let parts = [found].into_iter().chain(environment).chain(interpreter.into_iter().flat_map(|it| it.paths));
    Ok((file, parts.collect()))
}

fn on_path(program: &Path) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|candidate| candidate.is_file())
}

/// The file or folder that an argument names, if it names one.
fn named(argument: &Path, folder: &Path) -> Option<PathBuf> {
    let path = folder.join(argument);
    let (real, here) = (path.canonicalize().ok()?, folder.canonicalize().ok()?);
    // The working directory and what holds it would show everything.
    (!argument.as_os_str().is_empty() && !here.starts_with(real)).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_that_name_files_are_shown() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("verifier.py");
        std::fs::write(&script, "").unwrap();
        assert_eq!(named(Path::new("verifier.py"), folder.path()), Some(script.clone()));
        assert_eq!(named(&script, Path::new("/")), Some(script));
        for argument in ["--budget-calls", "", "/", ".", "..", "absent.py"] {
            assert_eq!(named(Path::new(argument), folder.path()), None, "{argument}");
        }
    }

    #[test]
    fn a_virtual_environment_is_shown_with_its_packages() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("venv");
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::write(root.join("pyvenv.cfg"), "").unwrap();
        std::fs::write(root.join("bin/judge"), "").unwrap();
        let (file, parts) = parts_of(Path::new("venv/bin/judge"), folder.path()).unwrap();
        assert_eq!((&file, parts), (&root.join("bin/judge"), BTreeSet::from([root.join("bin/judge"), root.clone()])));
        assert!(parts_of(Path::new("no-such-program"), folder.path()).is_err());
    }
}
