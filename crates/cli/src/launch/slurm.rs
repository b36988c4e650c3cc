//! The sbatch script of a job: one allocation, with one Slurm step per role.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use pacs_runtime::{harmless, harmless_lines};
use pacs_spec::{DeviceKind, JobSpec, RolloutEngineKind};

use super::quoted_path;
use crate::arguments::{LaunchSlurm, Only};

/// Absolute paths of the job, the same on every node.
#[derive(Debug)]
pub(crate) struct Place {
    /// Path of the job spec.
    pub(crate) job: PathBuf,
    /// Path of the run folder.
    pub(crate) run_dir: PathBuf,
    /// Folder that holds `pacs` and `pacs-worker`; put in front of PATH.
    pub(crate) programs: PathBuf,
    /// Working directory, against which relative paths of the spec resolve.
    pub(crate) here: PathBuf,
}

/// The resources to request from Slurm.
#[derive(Debug, PartialEq, Eq)]
struct Allocation {
    nodes: u32,
    tasks_per_node: u32,
    cpus_per_task: u32,
    /// GPUs per node; 0 when the job computes on CPUs.
    gpus_per_node: u32,
}

/// One Slurm step: the tasks of one role.
struct Step {
    role: &'static str,
    tasks: u32,
    /// Place of the first task, counted in tasks of this step that fill the allocation, node by node.
    offset: u32,
    start: Start,
    /// GPUs of each task, where the job computes on GPUs; 0 for a task that computes nothing.
    gpus: u32,
}

/// What starts a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// `pacs supervise` with this worker.
    Worker(&'static str),
    /// `pacs servers`, with a rollout worker next to its vLLM servers.
    Servers,
}

impl Step {
    /// The GPU after the last one of its tasks, counted node by node.
    fn end(&self) -> u32 {
        (self.offset + self.tasks) * self.gpus
    }
}

/// Renders the script.
///
/// # Errors
/// When the job does not fit the options, or a text cannot be passed safely to sbatch or the shell.
pub(crate) fn script(spec: &JobSpec, arguments: &LaunchSlurm, place: &Place) -> Result<String> {
    let steps = steps(spec, arguments.only);
    ensure!(!steps.is_empty(), "the job has no workers of this role (see [resources] in its spec)");
    check_servers(spec, &steps)?;
    check_warning(arguments)?;
    check_texts(arguments, place)?;
    let allocation = allocation(spec, arguments, &steps)?;
    let mut script = String::new();
    let options = options(spec, arguments, &allocation);
    header(&mut script, &options);
    let reads_job = arguments.only.is_none() || steps.iter().any(|step| step.start == Start::Servers);
    environment(&mut script, (arguments, place, &allocation), reads_job);
    script.push_str(FUNCTIONS);
    match arguments.only {
        None => {
            script.push_str(COORDINATOR);
            workers(&mut script, &steps, &allocation, false);
            script.push_str(END);
        }
        Some(_) => {
            script.push_str(JOINED);
            workers(&mut script, &steps, &allocation, true);
            script.push_str(END_OF_JOINED);
        }
    }
    // Quoting is easy to get wrong, and a wrong script is found out after hours in a queue: what a shell would read is compared here.
    read_back(&script, &options, (arguments, place), reads_job)?;
    Ok(script)
}

/// Refuses texts that would inject another script line or another sbatch option.
fn check_texts(arguments: &LaunchSlurm, place: &Place) -> Result<()> {
    if let Some(partition) = &arguments.partition {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.,+".contains(c);
        ensure!(!partition.is_empty() && partition.chars().all(is_plain), "--partition {partition:?}: expected a name");
    }
    for option in &arguments.sbatch {
        ensure!(option.starts_with('-'), "--sbatch {option:?}: expected an option, which begins with a dash");
        ensure!(harmless(option) == *option, "--sbatch {option:?}: expected one line of printable characters");
    }
    for command in &arguments.setup {
        ensure!(harmless_lines(command) == *command, "--setup {command:?}: expected printable characters");
        // An unterminated here-document, for example, would swallow the rest of the script.
        ensure!(
            !command.contains("<<"),
            "--setup {command:?}: a here-document belongs into a script that is called here"
        );
    }
    let tls_dir = arguments.tls_dir.as_ref().map(|folder| place.here.join(folder));
    for path in [&place.job, &place.run_dir, &place.programs, &place.here].into_iter().chain(&tls_dir) {
        let text =
            path.to_str().ok_or_else(|| anyhow!("path {path:?} is not UTF-8, and would be another one in a script"))?;
        ensure!(harmless(text) == text, "path {text:?} has characters that cannot be seen; rename it");
    }
    // A colon would split the entry of PATH in two.
    ensure!(!place.programs.to_string_lossy().contains(':'), "the folder `{}` has a colon", place.programs.display());
    Ok(())
}

/// Parses the script as sbatch and the shell would, and compares the result with the inputs.
fn read_back(
    script: &str,
    options: &[String],
    (arguments, place): (&LaunchSlurm, &Place),
    reads_job: bool,
) -> Result<()> {
    let comments = script.lines().take_while(|line| line.is_empty() || line.starts_with('#'));
    let read: Vec<&str> = comments.filter_map(|line| line.strip_prefix("#SBATCH ")).collect();
    ensure!(read == options, "the script's options are not what they should be; this is a bug");
    let mut words = vec![
        ("cd", place.here.clone()),
        ("export PACS_RUN_DIR=", place.run_dir.clone()),
        ("export PACS_COORDINATOR=", place.run_dir.clone()),
    ];
    words.extend(arguments.tls_dir.as_ref().map(|folder| ("export PACS_TLS_DIR=", place.here.join(folder))));
    if reads_job {
        words.push(("job=", place.job.clone()));
    }
    for (before, path) in words {
        let line = script.lines().find(|line| line.starts_with(before)).unwrap_or_default();
        let word =
            shlex::split(line.trim_end_matches(" || exit 75")).and_then(|mut words| words.pop()).unwrap_or_default();
        let value = word.strip_prefix(before.trim_start_matches("export ")).unwrap_or(&word);
        ensure!(Some(value) == path.to_str(), "the script has `{value}` for `{}`; this is a bug", path.display());
    }
    Ok(())
}

/// Parses a time limit of sbatch (`MIN`, `MIN:SEC`, `H:MIN:SEC`, `D-H`, `D-H:MIN`, `D-H:MIN:SEC`) into seconds; `None` is unlimited.
fn time_limit(time: &str) -> Result<Option<u64>> {
    if ["UNLIMITED", "INFINITE"].contains(&time.to_uppercase().as_str()) {
        return Ok(None);
    }
    let malformed =
        || anyhow!("--time {time}: expected minutes, H:MIN:SEC, D-H:MIN:SEC or UNLIMITED, as sbatch takes it");
    let (days, rest) = match time.split_once('-') {
        Some((days, rest)) => (Some(days.parse::<u64>().map_err(|_| malformed())?), rest),
        None => (None, time),
    };
    let parts = rest.split(':').map(|part| part.parse::<u64>().map_err(|_| malformed())).collect::<Result<Vec<_>>>()?;
    let (hours, minutes, seconds) = match (days, parts.as_slice()) {
        (None, [minutes]) => (0, *minutes, 0),
        (None, [minutes, seconds]) => (0, *minutes, *seconds),
        (Some(_), [hours]) => (*hours, 0, 0),
        (Some(_), [hours, minutes]) => (*hours, *minutes, 0),
        (_, [hours, minutes, seconds]) => (*hours, *minutes, *seconds),
        _ => return Err(malformed()),
    };
    let parts = [(days.unwrap_or(0), 86_400), (hours, 3600), (minutes, 60), (seconds, 1)];
    let total = parts.into_iter().try_fold(0u64, |total, (count, unit)| total.checked_add(count.checked_mul(unit)?));
    total.map(Some).ok_or_else(malformed)
}

/// Refuses rollout workers that would have no servers.
fn check_servers(spec: &JobSpec, steps: &[Step]) -> Result<()> {
    let names_them = spec.rollout.vllm.as_ref().is_some_and(|vllm| !vllm.endpoints.is_empty());
    let drives = steps.iter().any(|step| step.role == "rollout") && spec.rollout.engine == RolloutEngineKind::Vllm;
    ensure!(
        !drives || names_them || spec.own_servers().is_some(),
        "the job names no vLLM servers and starts none: have them started next to each rollout worker with \
         `rollout.vllm.server`, name those that run in `rollout.vllm.endpoints`, or set `resources.rollouts` = 0 and start \
         `pacs rollout` next to each server (docs/ENGINES.md)"
    );
    Ok(())
}

/// Refuses a warning that would come before the first step, because the job would be requeued forever without progress.
fn check_warning(arguments: &LaunchSlurm) -> Result<()> {
    let warning = u64::from(arguments.warning);
    if let Some(limit) = time_limit(&arguments.time)? {
        ensure!(
            limit > warning,
            "--time {} is {limit} s, and the run is saved {warning} s before its end (--warning): nothing would be done; \
             give more time or a shorter warning",
            arguments.time
        );
    }
    Ok(())
}

fn steps(spec: &JobSpec, only: Option<Only>) -> Vec<Step> {
    let resources = &spec.resources;
    let (rollout, gpus) = match (spec.rollout.engine, spec.own_servers()) {
        (RolloutEngineKind::Native, _) => (Start::Worker("pacs-worker rollout"), 1),
        (RolloutEngineKind::Vllm, Some(server)) => (Start::Servers, server.count * server.tensor_parallel),
        // The operator's servers have GPUs of their own, which this allocation does not know.
        (RolloutEngineKind::Vllm, None) => (Start::Worker("pacs rollout"), 0),
    };
    let after_learners = match (gpus, resources.device) {
        (0, _) => 0,
        (_, DeviceKind::Cpu) => spec.learners(),
        // The next place where all GPUs of a task are on one node.
        (_, DeviceKind::Cuda) => spec.learners().div_ceil(gpus),
    };
    let step = |role, tasks, offset, start, gpus| Step { role, tasks, offset, start, gpus };
    let verifier = Start::Worker("pacs verifier");
    let steps = match only {
        None => vec![
            step("verifier", resources.verifiers, 0, verifier, 0),
            step("rollout", resources.rollouts, after_learners, rollout, gpus),
            step("learner", spec.learners(), 0, Start::Worker("pacs-worker learner"), 1),
        ],
        Some(Only::Rollouts) => vec![step("rollout", resources.rollouts, 0, rollout, gpus)],
        Some(Only::Verifiers) => vec![step("verifier", resources.verifiers, 0, verifier, 0)],
    };
    steps.into_iter().filter(|step| step.tasks > 0).collect()
}

fn allocation(spec: &JobSpec, arguments: &LaunchSlurm, steps: &[Step]) -> Result<Allocation> {
    let gpus = match spec.resources.device {
        DeviceKind::Cpu => 0,
        DeviceKind::Cuda => steps.iter().map(Step::end).max().unwrap_or(0),
    };
    let most = steps.iter().map(|step| step.gpus).max().unwrap_or(0);
    ensure!(
        gpus == 0 || arguments.gpus_per_node.is_multiple_of(most.max(1)),
        "the servers of a rollout worker take {most} GPUs of one node, which have {}: choose `count` and `tensor_parallel` of \
         `rollout.vllm.server` so that their product divides --gpus-per-node",
        arguments.gpus_per_node
    );
    let cpus_per_task = arguments.cpus_per_task.unwrap_or(match spec.resources.threads {
        0 => 4,
        threads => threads,
    });
    if gpus > 0 {
        let nodes = arguments.nodes.unwrap_or(gpus.div_ceil(arguments.gpus_per_node));
        let room = nodes * arguments.gpus_per_node;
        let what = if most > 1 { "GPUs of learners and vLLM servers" } else { "workers with a GPU each" };
        ensure!(
            room >= gpus,
            "{gpus} {what} do not fit on {nodes} nodes with {} GPUs; give more with --nodes or --gpus-per-node, or ask for \
             fewer in [resources] of the spec",
            arguments.gpus_per_node
        );
        let gpus_per_node = arguments.gpus_per_node.min(gpus);
        return Ok(Allocation { nodes, tasks_per_node: gpus_per_node, cpus_per_task, gpus_per_node });
    }
    let nodes = arguments.nodes.unwrap_or(1);
    // Roles share cores: rollouts and learners alternate, and verifiers use little.
    let most = steps.iter().map(|step| step.tasks.div_ceil(nodes)).max().unwrap_or(1);
    Ok(Allocation { nodes, tasks_per_node: most, cpus_per_task, gpus_per_node: 0 })
}

/// Returns the `#SBATCH` options at the head of the script.
fn options(spec: &JobSpec, arguments: &LaunchSlurm, allocation: &Allocation) -> Vec<String> {
    let suffix = match arguments.only {
        None => "",
        Some(Only::Rollouts) => "-rollouts",
        Some(Only::Verifiers) => "-verifiers",
    };
    let mut options = vec![
        format!("--job-name={}{suffix}", spec.name),
        format!("--nodes={}", allocation.nodes),
        format!("--ntasks-per-node={}", allocation.tasks_per_node),
        format!("--cpus-per-task={}", allocation.cpus_per_task),
        format!("--time={}", arguments.time),
        "--requeue".to_owned(),
        "--open-mode=append".to_owned(),
        "--output=%x-%j.out".to_owned(),
        format!("--signal=B:USR1@{}", arguments.warning),
    ];
    if allocation.gpus_per_node > 0 {
        options.push(format!("--gpus-per-node={}", allocation.gpus_per_node));
    }
    options.extend(arguments.partition.iter().map(|partition| format!("--partition={partition}")));
    options.extend(arguments.sbatch.iter().cloned());
    options
}

fn header(script: &mut String, options: &[String]) {
    script.push_str("#!/bin/bash\n# Made by `pacs launch slurm`; docs/SLURM.md explains it.\n");
    options.iter().for_each(|option| put(script, format_args!("#SBATCH {option}")));
}

fn environment(
    script: &mut String,
    (arguments, place, allocation): (&LaunchSlurm, &Place, &Allocation),
    reads_job: bool,
) {
    let run_dir = quoted_path(&place.run_dir);
    let tls_dir = arguments.tls_dir.as_ref().map(|folder| quoted_path(&place.here.join(folder)));
    script.push_str("\nset -u\n");
    arguments.setup.iter().for_each(|command| put(script, command));
    put(script, format_args!("cd {} || exit 75", quoted_path(&place.here)));
    put(script, format_args!("export PATH={}:$PATH", quoted_path(&place.programs)));
    put(script, format_args!("export PACS_RUN_DIR={run_dir}"));
    put(script, "# Workers find the coordinator through the run folder, wherever it listens.");
    put(script, format_args!("export PACS_COORDINATOR={run_dir}"));
    put(
        script,
        format_args!("export PACS_TLS_DIR={}", tls_dir.clone().unwrap_or_else(|| "$PACS_RUN_DIR/tls".to_owned())),
    );
    put(script, format_args!("export PACS_THREADS={}", allocation.cpus_per_task));
    if allocation.gpus_per_node > 0 {
        put(script, "export PACS_DEVICE=cuda");
    }
    if arguments.only.is_none() {
        put(script, "# Which start of the job this is: leftovers of an earlier one on a lost node are refused.");
        put(script, "export PACS_ATTEMPT=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}");
    } else {
        put(script, "unset PACS_ATTEMPT");
    }
    if reads_job {
        put(script, format_args!("job={}", quoted_path(&place.job)));
    }
    put(script, "logs=$PACS_RUN_DIR/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}");
    put(script, "mkdir -p \"$PACS_RUN_DIR/logs\" || exit 75");
    put(script, "# Which run this is: made once for the folder, and what belongs to another run is refused.");
    put(script, "PACS_RUN_ID=$(pacs run-id \"$PACS_RUN_DIR\") || exit");
    put(script, "export PACS_RUN_ID");
    if tls_dir.is_none() && arguments.only.is_none() {
        put(script, "# The authority's key is not kept: what reads this folder can sign nothing.");
        put(script, "pacs certs --if-missing --forget-authority \"$PACS_TLS_DIR\" || exit 78");
    }
}

/// Shell functions that every script contains.
const FUNCTIONS: &str = r#"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Steps say for themselves what they need; srun would take these for theirs.
unset SLURM_NTASKS_PER_NODE SLURM_GPUS_PER_NODE

# place TASKS FIRST PER_NODE: prints the node of each task. Tasks are counted from FIRST, filling nodes of PER_NODE tasks one
# after the other, or going round when PER_NODE is 0.
place() {
    local i
    for ((i = $2; i < $1 + $2; i++)); do
        if (($3 > 0)); then echo "${nodes[i / $3]}"; else echo "${nodes[i % ${#nodes[@]}]}"; fi
    done
}

# step ROLE TASKS FIRST PER_NODE ARGUMENTS...: runs the tasks of a role with these arguments of srun. Each task is started
# again when it dies, and all are when the coordinator was away for longer than they look for it.
step() {
    local role=$1 tasks=$2 hosts=$logs-$1.hosts code
    place "$2" "$3" "$4" >"$hosts"
    shift 4
    while
        SLURM_HOSTFILE=$hosts srun --job-name="$role" --distribution=arbitrary --mem=0 --ntasks="$tasks" \
            --nodes="$(sort -u "$hosts" | wc -l)" --cpus-per-task="$PACS_THREADS" --output="$logs-$role-%t.log" \
            --open-mode=append "$@"
        code=$?
        # A run that has stopped needs this long to end; then there is nothing to resume.
        [ "$code" -eq 75 ] && sleep 10 && goes_on
    do :; done
    case $code in
    0 | 75) ;;
    *) if goes_on; then
        # A supervisor is killed from outside alone: its node was lost, or Slurm ended the step. That condemns no run.
        if ((code > 128)); then touch "$logs.lost"; else echo "$code" >"$logs.failed"; fi
        give_up "$role" "$code"
    fi ;;
    esac
}
"#;

/// Script part that starts the coordinator.
const COORDINATOR: &str = r#"
# The coordinator, on the first node. It waits for one that an earlier start may have left on a lost node.
srun --job-name=coordinator --overlap --mem=0 --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" --cpus-per-task=1 --gres=none \
    --output="$logs-coordinator.log" --open-mode=append \
    pacs supervise --crashes-only -- pacs coordinator "$job" --listen "${nodes[0]}:0" --folder-timeout 600 &
coordinator=$!
goes_on() { kill -0 "$coordinator" 2>/dev/null; }
give_up() { echo "the $1 step ended with exit code $2: ending the run" && kill -USR1 "$coordinator"; }

# The time limit is near: save, and resume after a requeue. Slurm tells this script only; srun passes it on.
trap 'kill -USR1 "$coordinator" 2>/dev/null' USR1
# The script outlives its tasks: a job that ends by itself is not requeued.
trap : TERM

"#;

/// Script part that waits for the coordinator, and requeues or ends the job by its exit code and the file `ending`.
const END: &str = r#"
while goes_on; do wait "$coordinator"; done
wait "$coordinator"
code=$?
ending=$(cat "$PACS_RUN_DIR/ending" 2>/dev/null)
echo "$(date -u +%FT%TZ) the coordinator ended with exit code $code: ${ending:-it left no word}"
[ -s "$logs.failed" ] && exit "$(cat "$logs.failed")"
# The workers were told to leave before; their last lines are on their way.
sleep 2

if [ "$code" -eq 75 ] || [ "$code" -gt 128 ]; then
    # An operator stopped it: it resumes when it is submitted again.
    [ "$ending" = stopped ] && exit 75
    # Slurm ended the steps. A job that is preempted must still be there when its grace is over.
    [ "$ending" = terminated ] && sleep 900
    scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
exit "$code"
"#;

/// Script part for workers that join the run of another job.
const JOINED: &str = r#"
goes_on() { case $(cat "$PACS_RUN_DIR/ending" 2>/dev/null) in finished | stopped | failed) return 1 ;; esac; }
give_up() { echo "the $1 step ended with exit code $2"; }
# The time limit is near: these have nothing to save.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
trap : TERM

"#;

/// Script part that waits for joined workers, and requeues the job when some were lost.
const END_OF_JOINED: &str = r#"
while [ -n "$(jobs -rp)" ]; do wait; done
[ -s "$logs.failed" ] && exit "$(cat "$logs.failed")"
[ -e "$logs.lost" ] && scontrol requeue "$SLURM_JOB_ID" && sleep 300
exit 0
"#;

/// Appends the steps of all workers. Joined workers get names with their job's id, because the run has workers of the same index.
fn workers(script: &mut String, steps: &[Step], allocation: &Allocation, joined: bool) {
    if allocation.gpus_per_node > 0 {
        script.push_str(ON_GPU);
    }
    if steps.iter().any(|step| step.start == Start::Servers) {
        script.push_str(SERVERS);
    }
    for Step { role, tasks, offset, start, gpus } in steps {
        // With GPUs, a learner, a rollout worker or its servers have their devices to themselves. The step is given all of a node: a
        // task whose cgroup holds its own GPU alone reaches the others by way of host memory, without NVLink.
        let gpus_per_node = if *gpus > 0 { allocation.gpus_per_node } else { 0 };
        let per_node = gpus_per_node / (*gpus).max(1);
        let mut share = match allocation.gpus_per_node {
            0 => "--overlap".to_owned(),
            _ if *gpus == 0 => "--overlap --gres=none".to_owned(),
            gpus => format!("--overlap --gpus-per-node={gpus} --gpu-bind=none --cpu-bind=none"),
        };
        if gpus_per_node > 0 && *gpus > 1 {
            // Those of all its GPUs; the last of two such options counts.
            let _ = write!(share, " --cpus-per-task={}", gpus * allocation.cpus_per_task);
        }
        // Losing one learner ends the step of all learners; other roles continue with one worker fewer.
        let deaths = u8::from(*role == "learner");
        let started = match (start, joined) {
            (Start::Worker(command), false) => format!("pacs supervise -- {command}"),
            (Start::Worker(command), true) => {
                format!("bash -c 'exec pacs supervise -- {command} --name \"{role}-$SLURM_JOB_ID-$SLURM_PROCID\"'")
            }
            (Start::Servers, false) => "bash -c \"$servers\" servers \"$job\" \"${logs##*/}\"".to_owned(),
            (Start::Servers, true) => {
                format!("bash -c \"$servers\" servers \"$job\" \"${{logs##*/}}\" \"{role}-$SLURM_JOB_ID\"")
            }
        };
        let on_gpu = match gpus_per_node {
            0 => String::new(),
            _ => format!("bash -c \"$on_gpu\" on_gpu {offset} {gpus_per_node} {gpus} "),
        };
        let options = format!("{share} --kill-on-bad-exit={deaths} --wait=0");
        put(script, format_args!("step {role} {tasks} {offset} {per_node} {options} \\\n    {on_gpu}{started} &"));
    }
}

/// What a task of a step with GPUs begins with.
const ON_GPU: &str = r#"# on_gpu FIRST PER_NODE EACH COMMAND...: shows a task EACH of the PER_NODE GPUs of its node, by its place among tasks of that size that
# fill the nodes one after the other.
on_gpu='
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
first=$((($1 + SLURM_PROCID) * $3 % $2)) shown=
for ((i = first; i < first + $3; i++)); do shown+=,${gpus[i]:-$i}; done
export CUDA_VISIBLE_DEVICES=${shown#,}
shift 3
exec "$@"
'
"#;

/// What a task of a step with vLLM servers is.
const SERVERS: &str = r#"# servers JOB LOGS [NAME]: starts vLLM servers of the job and a rollout worker next to them, with logs and a name of this task.
servers='
exec pacs servers "$1" --logs "$PACS_RUN_DIR/logs" --name "$2-vllm-$SLURM_PROCID" -- \
    pacs rollout ${3:+--name "$3-$SLURM_PROCID"}
'
"#;

fn put(script: &mut String, line: impl std::fmt::Display) {
    writeln!(script, "{line}").expect("a string takes any text");
}

#[cfg(test)]
mod tests;
