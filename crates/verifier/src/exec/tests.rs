//! Children are shell scripts: what they do wrong is in plain sight. They have no guard, which is another run of `pacs`:
//! `tests/tests/exec_children.rs` has that.

use pacs_types::Outcome;

use super::*;

const LIMIT: Duration = Duration::from_secs(30);

/// A shell script that sends its greeting and then runs `each` for every request, whose number is `$id`.
fn script(each: &str) -> Vec<String> {
    let script = format!(
        r#"echo '{{"pacs_verifier": 1, "version": "test 1"}}'
        while read -r line; do id=${{line#*\"id\":}}; id=${{id%%,*}}; {each}; done"#
    );
    ["sh", "-c", &script].map(str::to_owned).to_vec()
}

const RIGHT: &str = r#"echo "{\"id\": $id, \"outcome\": \"correct\", \"rule\": \"pid $$\"}""#;

fn exec(command: Vec<String>, limit: Duration, concurrency: usize) -> Exec {
    Exec::new(ExecSpec::new(command), None, limit, concurrency)
}

fn task(response: &str) -> Task {
    Task { question: "1 + 1?".into(), response: response.into(), gold: "2".into() }
}

async fn ask(exec: &Exec, response: &str) -> Result<Answer, Fault> {
    exec.verify(&task(response)).await.0
}

async fn rule(exec: &Exec, response: &str) -> String {
    ask(exec, response).await.unwrap_or_else(|fault| panic!("{fault}")).verdict.rule
}

async fn fault(each: &str) -> Fault {
    match ask(&exec(script(each), LIMIT, 1), "x").await {
        Ok(answer) => panic!("a verdict: {:?}", answer.verdict),
        Err(fault) => fault,
    }
}

#[tokio::test]
async fn a_child_lives_through_many_tasks() {
    let exec = exec(script(RIGHT), LIMIT, 1);
    let first = ask(&exec, "a\nb").await.unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!((first.verdict.outcome, first.verdict.label, &*first.version), (Outcome::Correct, 1.0, "test 1"));
    for _ in 0..20 {
        assert_eq!(rule(&exec, "c").await, first.verdict.rule, "the same process answers");
    }
}

#[tokio::test]
async fn the_child_gets_what_there_is_to_judge() {
    // The line comes back in the rule, its quotes made single.
    let exec = exec(
        script(
            r#"line=$(printf '%s' "$line" | tr '"' "'"); echo "{\"id\": $id, \"outcome\": \"wrong\", \"rule\": \"$line\"}""#,
        ),
        LIMIT,
        1,
    );
    assert_eq!(rule(&exec, "so 3").await, "{'id':1,'question':'1 + 1?','response':'so 3','gold':'2'}");
}

#[tokio::test]
async fn garbage_is_a_typed_fault_and_the_child_is_replaced() {
    let garbage = [
        ("echo nonsense", "in `nonsense`"),
        (r#"echo "{\"id\": $id}""#, "missing field `outcome`"),
        (r#"echo "{\"id\": $id, \"outcome\": \"right\"}""#, "unknown variant `right`"),
        (r#"echo "{\"id\": $id, \"outcome\": \"wrong\", \"lable\": 1}""#, "unknown field `lable`"),
        (r#"echo "{\"id\": $id, \"outcome\": \"wrong\", \"label\": 7}""#, "label is 7, expected 0 to 1"),
        (r#"echo '{"id": 99, "outcome": "wrong"}'"#, "it answers request 99, the request is 1"),
        ("head -c 2000000 /dev/zero", "more than 1048576 bytes"),
    ];
    for (each, expected) in garbage {
        let fault = fault(each).await;
        assert!(matches!(fault, Fault::Garbage { .. }), "{each}: {fault}");
        assert!(fault.to_string().contains(expected), "{each}: {fault}");
    }
    // The second request finds a new process, whose first request it is.
    let exec = exec(script(&format!(r#"case "$line" in *bad*) echo nonsense;; *) {RIGHT};; esac"#)), LIMIT, 1);
    let before = rule(&exec, "good").await;
    assert!(ask(&exec, "bad").await.is_err());
    assert_ne!(rule(&exec, "good").await, before);
}

#[tokio::test]
async fn a_child_that_dies_says_how_and_what_it_wrote() {
    let fault = fault("echo 'first line' >&2; echo 'cannot go on' >&2; exit 3").await;
    assert_eq!(fault.to_string(), "`sh` ended with exit code 3; it wrote: first line / cannot go on");
    let fault = super::tests::fault("kill -9 $$").await;
    assert_eq!(fault.to_string(), "`sh` was killed by signal 9");
}

#[tokio::test]
async fn a_child_that_ended_between_tasks_costs_no_task() {
    let exec = exec(script(&format!("{RIGHT}; exit 0")), LIMIT, 1);
    let first = rule(&exec, "a").await;
    // It is gone when its output has ended.
    let mut child = exec.idle.lock().unwrap().pop().unwrap();
    while !child.has_ended() {
        tokio::task::yield_now().await;
    }
    exec.idle.lock().unwrap().push(child);
    assert_ne!(rule(&exec, "b").await, first);
}

#[tokio::test]
async fn a_late_child_is_replaced() {
    let exec = exec(script(&format!(r#"case "$line" in *bad*) sleep 1000;; *) {RIGHT};; esac"#)), LIMIT, 1);
    let before = rule(&exec, "good").await;
    let exec = Exec { limit: Duration::from_millis(50), ..exec };
    let (answer, elapsed) = exec.verify(&task("bad")).await;
    let fault = answer.err().unwrap();
    assert_eq!(fault.to_string(), "no verdict within 0.05 s");
    assert_eq!(pacs_types::Verdict::from(fault).outcome, Outcome::TimedOut);
    assert!(elapsed >= exec.limit);
    assert_ne!(rule(&Exec { limit: LIMIT, ..exec }, "good").await, before);
}

#[tokio::test]
async fn an_abandoned_child_is_killed_with_its_descendants() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pids");
    // The child hangs in a process of its own, which must not survive.
    let exec = exec(script(&format!("sleep 1000 & echo $$ $! > {}; wait", file.display())), LIMIT, 1);
    let pids = async {
        loop {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            if text.ends_with('\n') {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let text = tokio::select! {
        _ = ask(&exec, "x") => panic!("it hangs"),
        text = pids => text,
    };
    let pids: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(pids.len(), 2, "{text}");
    for pid in pids {
        let gone = async {
            while is_alive(pid) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(tokio::time::timeout(LIMIT, gone).await.is_ok(), "process {pid} lives");
    }
}

/// Whether a process runs; one that only waits to be noticed does not.
fn is_alive(pid: &str) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')),
        Err(_) => false,
    }
}

#[tokio::test]
async fn a_child_that_reports_a_failure_keeps_running() {
    let exec = exec(
        script(&format!(
            r#"case "$line" in *bad*) echo "{{\"id\": $id, \"outcome\": \"failed\", \"rule\": \"no such test\"}}";; *) {RIGHT};; esac"#
        )),
        LIMIT,
        1,
    );
    let before = rule(&exec, "good").await;
    let fault = ask(&exec, "bad").await.err().unwrap();
    assert_eq!(fault.to_string(), "the verifier failed: no such test");
    assert_eq!(rule(&exec, "good").await, before);
}

#[tokio::test]
async fn a_command_that_cannot_start_says_why() {
    let start = async |command: &[&str]| {
        let command = command.iter().map(|part| (*part).to_owned()).collect();
        let fault = ask(&exec(command, LIMIT, 1), "x").await.err().unwrap();
        assert!(matches!(fault, Fault::Start { .. }), "{fault}");
        fault.to_string()
    };
    assert!(start(&["/no/such/program"]).await.starts_with("start `/no/such/program`: No such file"));
    let early = start(&["sh", "-c", "echo 'no module named x' >&2; exit 1"]).await;
    assert_eq!(early, "start `sh`: `sh` ended with exit code 1; it wrote: no module named x");
    let silent = start(&["sh", "-c", "echo hello; sleep 1000"]).await;
    assert!(silent.contains("its first line has to be") && silent.contains("`hello`"), "{silent}");
    let newer = start(&["sh", "-c", r#"echo '{"pacs_verifier": 2, "version": "x"}'"#]).await;
    assert_eq!(newer, "start `sh`: it speaks protocol 2, expected 1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn children_are_as_many_as_allowed() {
    let exec = Arc::new(exec(script(&format!("sleep 0.05; {RIGHT}")), LIMIT, 3));
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..12 {
        let exec = Arc::clone(&exec);
        asked.spawn(async move { rule(&exec, "x").await });
    }
    let children: std::collections::BTreeSet<String> = asked.join_all().await.into_iter().collect();
    assert!((1..=3).contains(&children.len()), "{children:?}");
    assert_eq!(exec.idle.lock().unwrap().len(), children.len());
}
