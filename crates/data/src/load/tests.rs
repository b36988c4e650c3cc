use std::fs;
use std::path::Path;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/models/qwen2-tied");

/// A job on the golden model with these lines added to its spec; `{dir}` in them is the folder.
fn job(dir: &Path, lines: &str) -> JobSpec {
    let lines = lines.replace("{dir}", &dir.display().to_string());
    let text = format!("name = 'test'\nmodel.path = '{MODEL}'\n{lines}\n");
    let mut spec = pacs_spec::parse(&text, Path::new("test.toml")).unwrap_or_else(|errors| panic!("{errors}"));
    // The golden model has 512 positions.
    spec.rollout.max_new_tokens = 100;
    spec
}

fn readable(answer: &str) -> Result<(), String> {
    if answer == "?" { Err("no number".to_owned()) } else { Ok(()) }
}

fn loaded(lines: &str, files: &[(&str, &str)]) -> Result<Problems, DataError> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, text) in files {
        fs::write(dir.path().join(name), text).expect("written");
    }
    load_with(&job(dir.path(), lines), readable, Day::today())
}

const OFF: &str = "evaluation = { before = false, after = false, every_steps = 0 }";

/// What is said of a training file with this text.
fn complaint(text: &str) -> String {
    let lines = format!("data.train.path = '{{dir}}/train.jsonl'\n{OFF}");
    let error = loaded(&lines, &[("train.jsonl", text)]).expect_err("the file is wrong").to_string();
    error.split_once("/train.jsonl").map_or(error.clone(), |(_, end)| end.to_owned())
}

#[test]
fn prompts_are_the_chat_template_around_question_and_suffix() {
    let lines = format!("data.train.path = '{{dir}}/t.jsonl'\ndata.system = 'Be brief.'\n{OFF}");
    let problems =
        loaded(&lines, &[("t.jsonl", "{\"question\": \"What is 1 + 1?\", \"answer\": 2}\n")]).expect("loads");
    let prompt = &problems.report.train.example_prompt;
    let expected = format!(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?{}<|im_end|>\n<|im_start|>assistant\n",
        pacs_spec::PAPER_SUFFIX
    );
    assert_eq!(*prompt, expected);
    let tokenizer = pacs_text::Tokenizer::read(Path::new(MODEL)).expect("a tokenizer");
    assert_eq!(problems.train[0].prompt_tokens, tokenizer.encode(&expected, false).expect("encoded"));
    assert_eq!((problems.train[0].question.as_str(), problems.train[0].answer.as_str()), ("What is 1 + 1?", "2"));
    assert_eq!(problems.report.train.longest_prompt_tokens, problems.train[0].prompt_tokens.len());
}

#[test]
fn a_template_in_the_spec_takes_the_place_of_the_model_s() {
    let lines = format!(
        "data.train.generator = {{ task = 'addition', held_out = 0 }}\ndata.prompt_suffix = ''\n\
         model.chat_template = '[{{{{ messages[0].content }}}}]{{{{ end }}}}'\n\
         model.template_variables = {{ end = '!' }}\n{OFF}"
    );
    let problems = loaded(&lines, &[]).expect("loads");
    let example = &problems.report.train.example_prompt;
    assert!(example.starts_with("[What is ") && example.ends_with("?]!"), "{example}");
    assert_eq!(problems.train.len(), 8100);
}

#[test]
fn what_is_left_out_is_counted() {
    let long = "x ".repeat(600);
    let rows = [
        ("How many?".to_owned(), "1"),
        (long, "2"),
        ("how  MANY".to_owned(), "3"),
        ("Unreadable".to_owned(), "?"),
        ("3 + 4".to_owned(), "7"),
        ("3 - 4".to_owned(), "-1"),
    ];
    let text: String = rows.iter().map(|(q, a)| format!("{}\n\n", serde_json::json!({"q": q, "a": a}))).collect();
    let fields = "question_field = 'q', answer_field = 'a'";
    let lines = format!(
        "data.max_prompt_tokens = 256\ndata.train = {{ path = '{{dir}}/t.jsonl', {fields} }}\n\
         data.evaluation = {{ path = '{{dir}}/t.jsonl', {fields}, skip = 3, limit = 2 }}"
    );
    let problems = loaded(&lines, &[("t.jsonl", &text)]).expect("loads");
    let report = &problems.report;
    let train = &report.train;
    assert_eq!((train.rows, train.kept, train.overlong, train.unreadable_answers, train.duplicates), (6, 4, 1, 1, 1));
    assert_eq!(problems.train.iter().map(|p| p.answer.as_str()).collect::<Vec<_>>(), ["1", "3", "7", "-1"]);
    assert_eq!(problems.sets[0].problems.iter().map(|p| p.answer.as_str()).collect::<Vec<_>>(), ["7"]);
    assert_eq!(report.overlap, 1);
    let shown = report.to_string();
    assert!(shown.contains("t.jsonl:7: no number"), "{shown}");
    assert!(shown.ends_with("; 1 evaluation problems are also trained on"), "{shown}");
}

#[test]
fn prompts_leave_room_for_the_answer() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let row = |words: usize| format!("{}\n", serde_json::json!({"question": "x ".repeat(words), "answer": 1}));
    fs::write(dir.path().join("t.jsonl"), row(10) + &row(200)).expect("written");
    let mut spec = job(dir.path(), &format!("data.train.path = '{{dir}}/t.jsonl'\n{OFF}"));
    let kept = |spec: &JobSpec| load_with(spec, readable, Day::today()).map(|problems| problems.train.len());
    spec.rollout.max_new_tokens = 300;
    assert_eq!(kept(&spec).expect("loads"), 1, "212 tokens are left");
    spec.rollout.max_new_tokens = 1;
    assert_eq!(kept(&spec).expect("loads"), 2, "511 tokens are left");
    spec.rollout.max_new_tokens = 512;
    let error = kept(&spec).expect_err("no token is left").to_string();
    assert!(error.contains("= 512 leaves no room for a prompt") && error.contains("512 positions"), "{error}");
}

#[test]
fn bad_rows_are_named_by_line() {
    let good = "{\"question\": \"q\", \"answer\": \"1\"}\n";
    assert_eq!(
        complaint(&format!("{good}\n{{\"question\": \"q\"\n")),
        "`:3: not a JSON object: EOF while parsing an object (column 16)"
    );
    assert_eq!(
        complaint("{\"ask\": \"q\", \"answer\": \"1\"}"),
        "`:1: there is none of the fields `question`, `problem`, `prompt`, `messages`, `query`, `instruction`, `input` (fields: `ask`, \
         `answer`); `question_field` and `answer_field` choose the fields"
    );
    assert_eq!(
        complaint("{\"question\": 5, \"answer\": \"1\"}"),
        "`:1: field `question` is a number, expected a text or a list of messages"
    );
    assert_eq!(
        complaint("{\"question\": \"q\", \"answer\": [1, 2]}"),
        "`:1: field `answer` is a list of 2 values (one value would be taken), expected a text or a number"
    );
    assert_eq!(complaint("{\"question\": \" \", \"answer\": 1}"), "`:1: field `question` is empty");
    assert_eq!(complaint("{\"question\": \"q\", \"answer\": \"\"}"), "`:1: field `answer` is empty");
    assert!(complaint("[1]").starts_with("`:1: not a JSON object: "));
    assert!(complaint("[{}").contains("begins as an array of JSON and does not end as one"));
}

#[test]
fn nothing_left_is_an_error_with_the_counts() {
    let text = "{\"question\": \"q\", \"answer\": \"?\"}\n";
    let lines = format!("data.train.path = '{{dir}}/t.jsonl'\n{OFF}");
    let error = loaded(&lines, &[("t.jsonl", text)]).expect_err("nothing is left").to_string();
    assert!(error.starts_with("no problem is left in `data.train`: 0 of 1 rows used, 1 with an unreadable"), "{error}");
    let error = loaded(&lines, &[("t.jsonl", "\n")]).expect_err("nothing is there").to_string();
    assert_eq!(error, "no problem is left in `data.train`: 0 of 0 rows used");
    let error = loaded(&lines, &[]).expect_err("no file").to_string();
    assert!(error.starts_with("read data file `") && error.contains("No such file"), "{error}");
}

fn write_parquet(path: &Path, questions: &[&str], answers: &[i64]) {
    let schema = "message rows { required binary question (UTF8); required int64 answer; }";
    let schema = Arc::new(parse_message_type(schema).expect("a schema"));
    let file = fs::File::create(path).expect("created");
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(WriterProperties::default())).expect("a writer");
    let mut group = writer.next_row_group().expect("a row group");
    let texts: Vec<ByteArray> = questions.iter().map(|text| ByteArray::from(*text)).collect();
    let mut column = group.next_column().expect("a column").expect("the first");
    column.typed::<ByteArrayType>().write_batch(&texts, None, None).expect("written");
    column.close().expect("closed");
    let mut column = group.next_column().expect("a column").expect("the second");
    column.typed::<Int64Type>().write_batch(answers, None, None).expect("written");
    column.close().expect("closed");
    group.close().expect("closed");
    writer.close().expect("closed");
}

#[test]
fn parquet_files_are_read() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("t.parquet");
    write_parquet(&path, &["one", "two", "three"], &[1, 2, 3]);
    assert_eq!(crate::count_rows(&path).expect("counted"), 3);
    let lines = format!("data.train.path = '{{dir}}/t.parquet'\ndata.train.skip = 1\n{OFF}");
    let problems = load_with(&job(dir.path(), &lines), readable, Day::today()).expect("loads");
    let rows: Vec<(&str, &str)> = problems.train.iter().map(|p| (p.question.as_str(), p.answer.as_str())).collect();
    assert_eq!(rows, [("two", "2"), ("three", "3")]);

    let lines = format!("data.train = {{ path = '{{dir}}/t.parquet', question_field = 'q' }}\n{OFF}");
    let error = load_with(&job(dir.path(), &lines), readable, Day::today()).expect_err("no such column").to_string();
    assert!(error.contains("t.parquet`: there is no field `q` (fields: `question`, `answer`)"), "{error}");
    fs::write(&path, "no parquet").expect("written");
    let error = load_with(&job(dir.path(), &lines), readable, Day::today()).expect_err("garbage").to_string();
    assert!(error.starts_with("read data file `") && error.contains("t.parquet"), "{error}");
}

#[test]
fn the_cursor_walks_through_all_training_problems() {
    let lines = format!("data.train.generator = {{ task = 'multiplication', low = 1, high = 5 }}\n{OFF}");
    let lines = lines.replace("high = 5", "high = 5, held_out = 5");
    let problems = loaded(&lines, &[]).expect("loads");
    let mut drawn: Vec<&str> = (0..20).map(|cursor| problems.train_at(cursor).question.as_str()).collect();
    drawn.sort_unstable();
    drawn.dedup();
    assert_eq!(drawn.len(), 20);
}

#[test]
fn shared_data_sets_load() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/gsm8k_train.jsonl");
    if !file.exists() {
        println!("SKIPPED: {} is not there", file.display());
        return;
    }
    let lines = format!("data.train.path = '{}'\n{OFF}", file.display());
    let problems = load(&job(Path::new("."), &lines)).expect("loads");
    println!("{}", problems.report);
    assert_eq!(problems.report.train.rows, 7473);
    assert_eq!(problems.report.train.kept + problems.report.train.overlong, 7473);
    assert_eq!((problems.report.train.duplicates, problems.report.train.unreadable_answers), (0, 0));
}

#[test]
fn rows_and_sets_name_their_verifiers_and_cases_are_json() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let rows = [
        r#"{"question": "add", "answer": [{"input": "1 2", "output": "3"}], "by": "programs"}"#,
        r#"{"question": "double", "answer": ["assert f(1) == 2", "assert f(2) == 4"], "by": "programs"}"#,
        r#"{"question": "1 + 1?", "answer": 2, "by": null}"#,
        r#"{"question": "sort", "answer": "1 2 3", "by": "nobody"}"#,
        r#"{"question": "count", "answer": "no cases", "by": "programs"}"#,
    ];
    fs::write(dir.path().join("t.jsonl"), rows.join("\n")).expect("written");
    fs::write(dir.path().join("m.jsonl"), "{\"question\": \"say a\", \"answer\": \"a\"}\n").expect("written");
    let lines = format!(
        "{OFF}\n[data.train]\npath = '{{dir}}/t.jsonl'\nverifier_field = 'by'\n\
         [data.mix.words]\npath = '{{dir}}/m.jsonl'\nverifier = 'exact'\n[verifiers.programs]\nkind = 'code'"
    );
    let problems = load_on(&job(dir.path(), &lines), Day::today()).expect("loads");
    let found: Vec<_> =
        problems.train.iter().map(|problem| (problem.answer.as_str(), problem.verifier.as_deref())).collect();
    let expected = [
        (r#"[{"input":"1 2","output":"3"}]"#, Some("programs")),
        (r#"["assert f(1) == 2","assert f(2) == 4"]"#, Some("programs")),
        ("2", None),
        ("a", Some("exact")),
    ];
    assert_eq!(found, expected);
    assert_eq!(problems.report.train.unreadable_answers, 2);
    let first = problems.report.train.first_unreadable.expect("named");
    assert!(first.contains("t.jsonl:4: it names the verifier `nobody`"), "{first}");
    // A problem that names no verifier is the one that it was.
    let Problem { question, answer, prompt_tokens, .. } = problems.train[2].clone();
    let named = Problem { question, answer, verifier: Some("programs".into()), prompt_tokens };
    assert_ne!(named.digest(), problems.train[2].digest());
}
