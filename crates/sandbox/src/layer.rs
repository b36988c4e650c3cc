//! The layers of isolation, and which of them hold.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// One layer of isolation. Each stops something that the others let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// A user namespace: privileges inside of it are none outside.
    User,
    /// A mount namespace whose root holds the interpreter and libraries, read-only, and a private `/tmp`.
    Mount,
    /// A pid namespace for each job: other processes cannot be named, and all of the job's die with it.
    Pid,
    /// A network namespace without any interface but its own loopback.
    Net,
    /// An IPC namespace: no System V objects or message queues of others.
    Ipc,
    /// A UTS namespace: the host's name is not told and cannot be set.
    Uts,
    /// No program gains privileges by being executed.
    NoNewPrivs,
    /// All capabilities are dropped, from the bounding set, too.
    Capabilities,
    /// Landlock: files outside of the view cannot be opened even where they can be named.
    Landlock,
    /// A list of system calls that are allowed; all others are refused.
    Seccomp,
    /// Limits of each process: memory, processor time, size of files, descriptors, processes.
    Rlimits,
    /// A control group (version 2): memory and processes of the whole tree.
    Cgroup,
}

impl Layer {
    /// All of them, from the outermost in.
    pub const ALL: [Self; 12] = [
        Self::User,
        Self::Mount,
        Self::Pid,
        Self::Net,
        Self::Ipc,
        Self::Uts,
        Self::NoNewPrivs,
        Self::Capabilities,
        Self::Landlock,
        Self::Seccomp,
        Self::Rlimits,
        Self::Cgroup,
    ];

    /// Name as in a spec.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Mount => "mount",
            Self::Pid => "pid",
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::NoNewPrivs => "no_new_privs",
            Self::Capabilities => "capabilities",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
            Self::Rlimits => "rlimits",
            Self::Cgroup => "cgroup",
        }
    }

    /// The layer of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|layer| layer.name() == name)
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which layers hold on this machine: `None`, or why one does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers(pub(crate) BTreeMap<Layer, Option<String>>);

impl Layers {
    /// Every layer, and why it does not hold where it does not.
    pub fn iter(&self) -> impl Iterator<Item = (Layer, Option<&str>)> {
        Layer::ALL.into_iter().map(|layer| match self.0.get(&layer) {
            Some(missing) => (layer, missing.as_deref()),
            None => (layer, Some("was not tried")),
        })
    }

    /// Those that do not hold, with the reason.
    pub fn missing(&self) -> impl Iterator<Item = (Layer, &str)> {
        self.iter().filter_map(|(layer, missing)| Some((layer, missing?)))
    }

    /// Those that do not hold and are not among the `allowed`.
    #[must_use]
    pub fn refused(&self, allowed: &[Layer]) -> Vec<(Layer, String)> {
        let refused = self.missing().filter(|(layer, _)| !allowed.contains(layer));
        refused.map(|(layer, why)| (layer, why.to_owned())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_serde_and_lead_back() {
        for layer in Layer::ALL {
            assert_eq!(serde_json::to_value(layer).unwrap(), layer.name());
            assert_eq!(Layer::named(layer.name()), Some(layer));
        }
        assert_eq!(Layer::named("network"), None);
    }

    #[test]
    fn what_was_not_tried_does_not_hold() {
        let layers = Layers(BTreeMap::from([(Layer::Net, None), (Layer::Pid, Some("EPERM".to_owned()))]));
        let missing: Vec<_> = layers.missing().collect();
        assert_eq!(missing.len(), Layer::ALL.len() - 1);
        assert!(missing.contains(&(Layer::Pid, "EPERM")) && missing.contains(&(Layer::Cgroup, "was not tried")));
        let allowed: Vec<_> = Layer::ALL.into_iter().filter(|layer| *layer != Layer::Pid).collect();
        assert_eq!(layers.refused(&allowed), [(Layer::Pid, "EPERM".to_owned())]);
    }
}
