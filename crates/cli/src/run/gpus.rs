//! Which GPU of this machine each worker of `pacs run` gets.
//!
//! Every worker computes on the first GPU that it sees, so it is shown one: two learner ranks on one GPU are an error of NCCL, and
//! a rollout worker next to a learner takes memory that the learner has planned with. A vLLM server is shown as many as it divides its
//! model among, and shares none, because it fills the memory of a GPU.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use pacs_spec::{DeviceKind, JobSpec};
use serde_json::{Value, json};

use crate::format::plural;
use crate::servers::SERVER;

/// Names the GPUs that a process sees, in the order in which it counts them.
pub(crate) const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// What `pacs run` gives its workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gpus {
    /// Those of this machine that may be used, as [`VISIBLE`] names them. Made up where the machine shows none.
    usable: Vec<String>,
    /// Those that this machine shows.
    shown: usize,
    /// Places in `usable` of those of every worker and server.
    places: BTreeMap<String, Vec<usize>>,
    problem: Option<String>,
}

impl Gpus {
    /// Of this machine, for the workers of a job; `None` for a job that computes on processors.
    pub(crate) fn of(spec: &JobSpec) -> Option<Self> {
        (spec.resources.device == DeviceKind::Cuda).then(|| Self::among(spec, &visible()))
    }

    /// Learners first, each on a GPU of its own; then servers on theirs, and rollout workers on those that have fewest workers.
    fn among(spec: &JobSpec, shown: &[String]) -> Self {
        let (resources, learners) = (&spec.resources, spec.learners() as usize);
        let computing_rollouts = spec.computing_rollouts();
        let of_server = spec.own_servers().map_or(1, |servers| servers.tensor_parallel as usize);
        let servers = spec.own_servers().map_or(0, |servers| (resources.rollouts * servers.count) as usize);
        let alone = learners + servers * of_server;
        let workers = alone + computing_rollouts as usize;
        let wanted = resources.gpus.map_or(workers, |gpus| gpus as usize);
        let usable: Vec<String> = match (shown, resources.gpus) {
            // Another machine than the one that runs it: what it would take.
            ([], _) => (0..wanted).map(|index| index.to_string()).collect(),
            (shown, Some(gpus)) => shown.iter().take(gpus as usize).cloned().collect(),
            (shown, None) => shown.to_vec(),
        };
        let (counted, have) = (plural(usable.len() as u64, "GPU", "GPUs"), usable.len());
        let problem = if !shown.is_empty() && resources.gpus.is_some_and(|gpus| gpus as usize > shown.len()) {
            let shown = plural(shown.len() as u64, "GPU", "GPUs");
            Some(format!("`resources.gpus = {wanted}`, and this machine shows {shown}"))
        } else if learners > have {
            let ranks = plural(learners as u64, "learner rank", "learner ranks");
            Some(format!("{ranks} and {counted}: ranks never share one; lower `resources.learners`"))
        } else if servers > 0 && alone > have {
            let (ranks, each) =
                (plural(learners as u64, "learner", "learners"), plural(of_server as u64, "GPU", "GPUs"));
            let servers = plural(servers as u64, "vLLM server", "vLLM servers");
            Some(format!(
                "{ranks} on a GPU each and {servers} on {each} each take {alone}, and there {} {counted}: lower \
                 `resources.learners`, `resources.rollouts`, or `count` and `tensor_parallel` of `rollout.vllm.server`",
                if have == 1 { "is" } else { "are" }
            ))
        } else if workers > have && !resources.share_gpus {
            let rollouts = plural(u64::from(computing_rollouts), "rollout worker", "rollout workers");
            let ranks = plural(learners as u64, "learner", "learners");
            Some(format!(
                "{ranks} and {rollouts} want a GPU each, and there {} {counted}: ask for fewer workers in [resources], or let \
                 them share with `resources.share_gpus = true`",
                if have == 1 { "is" } else { "are" }
            ))
        } else {
            None
        };
        let mut places = BTreeMap::new();
        if problem.is_none() && have > 0 {
            let mut load = vec![0usize; have];
            let names = |role: &'static str, count: usize| (0..count).map(move |index| format!("{role}-{index}"));
            let wanted = names("learner", learners)
                .map(|name| (name, 1))
                .chain(names(SERVER, servers).map(|name| (name, of_server)))
                .chain(names("rollout", computing_rollouts as usize).map(|name| (name, 1)));
            for (name, count) in wanted {
                let mut free: Vec<usize> = (0..have).collect();
                free.sort_by_key(|place| load[*place]);
                free.truncate(count);
                free.iter().for_each(|place| load[*place] += 1);
                places.insert(name, free);
            }
        }
        Self { usable, shown: shown.len(), places, problem }
    }

    /// Why the job cannot run on this machine.
    pub(crate) fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Whether this machine shows any.
    pub(crate) fn are_there(&self) -> bool {
        self.shown > 0
    }

    /// What the worker or server of a name is to see, as [`VISIBLE`] names it.
    pub(crate) fn of_worker(&self, name: &str) -> Option<String> {
        self.places.get(name).map(|places| self.named(places))
    }

    fn named(&self, places: &[usize]) -> String {
        let names: Vec<&str> = places.iter().map(|place| self.usable[*place].as_str()).collect();
        names.join(",")
    }

    pub(crate) fn json(&self) -> Value {
        let workers: BTreeMap<&str, String> =
            self.places.iter().map(|(name, places)| (name.as_str(), self.named(places))).collect();
        json!({"shown": self.shown, "workers": workers, "problem": self.problem})
    }
}

impl std::fmt::Display for Gpus {
    /// One line for each GPU.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(problem) = &self.problem {
            return writeln!(f, "gpus        cannot be assigned: {problem}");
        }
        for (place, gpu) in self.usable.iter().enumerate() {
            let workers = self.places.iter().filter(|(_, of)| of.contains(&place)).map(|(name, _)| name.as_str());
            let workers: Vec<&str> = workers.collect();
            let head = if place == 0 { "gpus" } else { "" };
            let workers = if workers.is_empty() { "no worker".to_owned() } else { workers.join(", ") };
            writeln!(f, "{head:<12}GPU {gpu}: {workers}")?;
        }
        if !self.are_there() && !self.usable.is_empty() {
            writeln!(f, "note        this machine shows no GPU; `pacs run` needs the above where it runs")?;
        }
        Ok(())
    }
}

/// The GPUs that this process sees: what the environment says, or else all that the driver lists.
pub(crate) fn visible() -> Vec<String> {
    if let Ok(list) = std::env::var(VISIBLE) {
        return named(&list);
    }
    match Command::new("nvidia-smi").arg("--list-gpus").stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => listed(&String::from_utf8_lossy(&output.stdout)),
        // Containers may have the driver without its tools.
        Ok(_) | Err(_) => device_files(Path::new("/dev")),
    }
}

/// As many as there are files `nvidia0`, `nvidia1`, … in a folder, counted from 0 as CUDA does.
fn device_files(folder: &Path) -> Vec<String> {
    let is_gpu = |name: &str| {
        name.strip_prefix("nvidia")
            .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let count = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_gpu)).count();
    (0..count).map(|index| index.to_string()).collect()
}

/// Those of a list as CUDA reads it: up to the first that is none.
fn named(list: &str) -> Vec<String> {
    let names = list.split(',').map(str::trim);
    names.take_while(|name| !name.is_empty() && !name.starts_with('-')).map(str::to_owned).collect()
}

/// Those that `nvidia-smi --list-gpus` prints, by index. Parts of a GPU are listed below it and have to be named in the
/// environment.
fn listed(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| line.starts_with("GPU "));
    lines.filter_map(|line| Some(line.strip_prefix("GPU ")?.split(':').next()?.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn spec(resources: &str) -> JobSpec {
        let text = format!(
            "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
             resources = {{ device = 'cuda', {resources} }}"
        );
        pacs_spec::parse(&text, Path::new("job.toml")).unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn among(resources: &str, shown: &[&str]) -> Gpus {
        let shown: Vec<String> = shown.iter().map(|name| (*name).to_owned()).collect();
        Gpus::among(&spec(resources), &shown)
    }

    #[test]
    fn every_worker_has_a_gpu_to_itself() {
        let gpus = among("learners = 2, rollouts = 2", &["0", "1", "2", "3", "4"]);
        let found = ["learner-0", "learner-1", "rollout-0", "rollout-1", "verifier-0"].map(|name| gpus.of_worker(name));
        assert_eq!(found.each_ref().map(Option::as_deref), [Some("0"), Some("1"), Some("2"), Some("3"), None]);
        expect![[r#"
            gpus        GPU 0: learner-0
                        GPU 1: learner-1
                        GPU 2: rollout-0
                        GPU 3: rollout-1
                        GPU 4: no worker
        "#]]
        .assert_eq(&gpus.to_string());
        // What the environment names is passed on as it is.
        let gpus = among("gpus = 2", &["GPU-5ebe", "GPU-77aa", "GPU-0000"]);
        let found = ["learner-0", "rollout-0"].map(|name| gpus.of_worker(name));
        assert_eq!(found.each_ref().map(Option::as_deref), [Some("GPU-5ebe"), Some("GPU-77aa")]);
    }

    #[test]
    fn rollout_workers_share_where_the_job_says_so() {
        let gpus = among("rollouts = 3, learners = 1, share_gpus = true", &["0", "1"]);
        let found = ["learner-0", "rollout-0", "rollout-1", "rollout-2"].map(|name| gpus.of_worker(name));
        assert_eq!(found.each_ref().map(Option::as_deref), [Some("0"), Some("1"), Some("0"), Some("1")]);
        assert_eq!(among("share_gpus = true", &["0"]).of_worker("rollout-0").as_deref(), Some("0"));
        assert_eq!(gpus.json()["workers"]["rollout-2"], "1");
    }

    #[test]
    fn servers_have_as_many_as_they_divide_their_model_among() {
        let of = |resources: &str, shown: &[&str]| {
            let text = format!(
                "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
                 rollout = {{ engine = 'vllm', vllm.server = {{ tensor_parallel = 2, count = 2 }} }}\n\
                 resources = {{ device = 'cuda', {resources} }}"
            );
            let spec = pacs_spec::parse(&text, Path::new("job.toml")).unwrap_or_else(|errors| panic!("{errors}"));
            Gpus::among(&spec, &shown.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
        };
        let eight = ["0", "1", "2", "3", "4", "5", "6", "7"];
        let gpus = of("learners = 3", &eight);
        let found = ["learner-2", "vllm-0", "vllm-1", "rollout-0"].map(|name| gpus.of_worker(name));
        assert_eq!(found.each_ref().map(Option::as_deref), [Some("2"), Some("3,4"), Some("5,6"), None]);
        assert_eq!(gpus.json()["workers"]["vllm-1"], "5,6");
        assert!(gpus.to_string().contains("GPU 4: vllm-0\n"), "{gpus}");
        // Sharing is for rollout workers of the native engine alone.
        let gpus = of("learners = 1, rollouts = 2, share_gpus = true", &eight);
        let problem = "1 learner on a GPU each and 4 vLLM servers on 2 GPUs each take 9, and there are 8 GPUs";
        assert!(gpus.problem().is_some_and(|found| found.starts_with(problem)), "{:?}", gpus.problem());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (resources, shown, problem) in [
            (
                "rollouts = 1, learners = 1",
                &["0"][..],
                "1 learner and 1 rollout worker want a GPU each, and there is 1 GPU",
            ),
            ("learners = 2, share_gpus = true", &["0"], "2 learner ranks and 1 GPU: ranks never share one"),
            ("gpus = 4", &["0", "1"], "`resources.gpus = 4`, and this machine shows 2 GPUs"),
        ] {
            let gpus = among(resources, shown);
            assert!(gpus.problem().is_some_and(|found| found.starts_with(problem)), "{:?}", gpus.problem());
            assert_eq!(gpus.of_worker("learner-0"), None);
        }
    }

    #[test]
    fn a_machine_without_gpus_says_what_the_job_takes() {
        let gpus = among("learners = 1, rollouts = 1", &[]);
        expect![[r#"
            gpus        GPU 0: learner-0
                        GPU 1: rollout-0
            note        this machine shows no GPU; `pacs run` needs the above where it runs
        "#]]
        .assert_eq(&gpus.to_string());
        assert!(gpus.problem().is_none() && !gpus.are_there());
    }

    #[test]
    fn lists_are_read_as_cuda_reads_them() {
        assert_eq!(named("2, 0"), ["2", "0"]);
        assert_eq!(named("0,-1,1"), ["0"]);
        assert_eq!([named(""), named("-1")], [[""; 0]; 2]);
        let text = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5ebe)\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA H100\n";
        assert_eq!(listed(text), ["0", "1"]);
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in ["nvidia3", "nvidia5", "nvidiactl", "nvidia-uvm", "null"] {
            std::fs::write(folder.path().join(name), "").expect("written");
        }
        assert_eq!(device_files(folder.path()), ["0", "1"]);
    }
}
