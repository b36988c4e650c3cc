//! Files as they are found, in every format, with the values that are right.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use ::parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
use ::parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;

use super::*;

/// What was read: the chosen fields, and question and answer of each row or what is wrong with it.
type Found = (Option<String>, Vec<Result<(Asked, String), String>>);

fn read_as(path: &Path, question: &str, answer: &str) -> Result<Found, DataError> {
    let source = SourceSpec {
        path: Some(path.to_owned()),
        question_field: question.to_owned(),
        answer_field: answer.to_owned(),
        ..SourceSpec::default()
    };
    let mut found = Vec::new();
    let fields = rows(&source, &mut |row| {
        match row {
            Ok(Record { asked, answer, .. }) => found.push(Ok((asked, answer))),
            Err(DataError::Row { row, message, .. }) => found.push(Err(format!("{row}: {message}"))),
            Err(error) => return Err(error),
        }
        Ok(())
    })?;
    Ok((fields, found))
}

fn read(path: &Path) -> Result<Found, DataError> {
    read_as(path, "question", "answer")
}

/// Questions and answers of a file without mistakes.
fn texts(path: &Path) -> Vec<(String, String)> {
    let found = read(path).unwrap_or_else(|error| panic!("{error}")).1;
    let row = |row: Result<(Asked, String), String>| row.map(|(asked, answer)| (asked.question().to_owned(), answer));
    found.into_iter().map(|found| row(found).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).collect()
}

fn file(dir: &tempfile::TempDir, name: &str, content: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, content).expect("written");
    path
}

fn case(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases").join(path)
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text.as_bytes()).expect("in memory");
    encoder.finish().expect("in memory")
}

#[test]
fn one_set_in_every_format_is_the_same_set() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let lines = "\n{\"question\": \"What is 1 + 1?\", \"answer\": 2}\n\n{\"question\": \"A \\\"b\\\", c\", \"answer\": \"7.50\"}\n";
    let array = "\r\n [{\"question\": \"What is 1 + 1?\", \"answer\": 2},\n{\"question\": \"A \\\"b\\\", c\", \"answer\": \"7.50\"} ]\n";
    let table = "id,question,answer\r\n1,What is 1 + 1?,2\r\n2,\"A \"\"b\"\", c\",7.50\r\n";
    let tabs = "question\tanswer\nWhat is 1 + 1?\t2\n\"A \"\"b\"\", c\"\t7.50\n";
    let marked = |text: &str| format!("\u{feff}{text}").into_bytes();
    let zstd = |text: &str| zstd::encode_all(text.as_bytes(), 3).expect("in memory");
    let expected = [("What is 1 + 1?", "2"), ("A \"b\", c", "7.50")];
    for (name, content) in [
        ("a.jsonl", lines.into()),
        ("b.json", lines.into()),
        ("c.json", array.into()),
        ("d.jsonl", array.into()),
        ("e.jsonl", marked(lines)),
        ("f.json", marked(array)),
        ("g.jsonl.gz", gzip(lines)),
        ("h.json.zst", zstd(array)),
        ("packed-and-not-named-so.jsonl", gzip(lines)),
        ("i.ndjson", zstd(lines)),
        ("j.csv", table.into()),
        ("k.csv.gz", gzip(table)),
        ("l.tsv", marked(tabs)),
    ] {
        let path = file(&dir, name, content.as_slice());
        let found = texts(&path);
        assert!(found.iter().map(|(q, a)| (q.as_str(), a.as_str())).eq(expected), "{name}: {found:?}");
        assert_eq!(count_rows(&path).expect("counted"), 2, "{name}");
    }
    // Lines are counted as an editor counts them.
    let broken = file(&dir, "m.jsonl", b"\n\n{\"question\": \"q\", \"answer\": 1}\n{\"question\": 1}\n");
    assert!(read(&broken).expect("read").1[1].as_ref().is_err_and(|error| error.starts_with("4: there is")));
}

#[test]
fn a_worked_solution_ends_with_its_answer() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let answers = [
        "He has 48/2 = <<48/2=24>>24.\\n#### 24",
        "#### 1,250\\n ",
        "#### a\\nb",
        "## 3",
        "x #### 3",
        "x\\n####",
        "y\\n##### 3",
    ];
    let lines: String =
        answers.iter().map(|answer| format!("{{\"question\": \"q\", \"answer\": \"{answer}\"}}\n")).collect();
    let found: Vec<String> =
        texts(&file(&dir, "g.jsonl", lines.as_bytes())).into_iter().map(|(_, answer)| answer).collect();
    assert_eq!(found, ["24", "1,250", "#### a\nb", "## 3", "x #### 3", "x\n####", "y\n##### 3"]);
}

#[test]
fn files_of_a_pattern_are_one_set_with_one_window() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let lines = |range: std::ops::Range<u32>| -> String {
        range.map(|i| format!("{{\"prompt\": \"q{i}\", \"target\": {i}}}\n")).collect()
    };
    file(&dir, "t-0.jsonl", lines(0..3).as_bytes());
    file(&dir, "t-1.jsonl", b"");
    file(&dir, "t-2.jsonl", lines(3..5).as_bytes());
    let path = dir.path().join("t-*.jsonl");
    assert_eq!((count_rows(&path).expect("counted"), is_there(&path)), (5, true));
    assert!(!is_there(&dir.path().join("u-*.jsonl")));
    let answers = |skip: Option<usize>, limit: Option<usize>| {
        let source = SourceSpec { path: Some(path.clone()), skip, limit, ..SourceSpec::default() };
        let mut found = Vec::new();
        let take = &mut |row: Result<Record, DataError>| row.map(|row| found.push(row.answer));
        let fields = rows(&source, take).expect("read");
        (found.join(""), fields)
    };
    let fields = Some("questions from `prompt`, answers from `target`".to_owned());
    for (skip, limit, expected) in [
        (None, None, "01234"),
        (Some(2), None, "234"),
        (Some(2), Some(2), "23"),
        (None, Some(3), "012"),
        (Some(3), Some(9), "34"),
        (Some(4), None, "4"),
    ] {
        assert_eq!(answers(skip, limit), (expected.to_owned(), fields.clone()), "{skip:?} {limit:?}");
    }
    file(&dir, "t-3.jsonl", b"{\"question\": \"q\", \"answer\": 1}\n");
    let source = SourceSpec { path: Some(path.clone()), ..SourceSpec::default() };
    let error = rows(&source, &mut |row| row.map(drop)).expect_err("other fields").to_string();
    assert!(error.contains("t-3.jsonl") && error.contains("fields are not those of"), "{error}");
}

#[test]
fn the_case_of_a_byte_order_mark_is_read() {
    let found = texts(&case("bom/bom.jsonl"));
    let answers: Vec<&str> = found.iter().map(|(_, answer)| answer.as_str()).collect();
    assert_eq!(answers, ["72", "10"]);
    assert!(found[0].0.starts_with("Natalia sold clips to 48"), "{found:?}");
}

#[test]
fn what_is_no_text_says_what_it_is() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let utf16: Vec<u8> = "\u{feff}{\"question\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let bare: Vec<u8> = "{\"question\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (content, said) in [
        (&utf16[..], "UTF-16"),
        (&bare, "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS"),
        (b"PAR1....PAR1", "a Parquet file; name it `.parquet`"),
        (b"PK\x03\x04....", "unpack it"),
        (b"<!DOCTYPE html>", "a page of HTML"),
    ] {
        let error = read(&file(&dir, "t.jsonl", content)).expect_err(said).to_string();
        assert!(error.contains("t.jsonl") && error.contains(said), "{error}");
    }
    let pointer = file(&dir, "t.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
    assert!(read(&pointer).expect_err("no Parquet").to_string().contains("pointer of Git LFS"));
    let uneven = file(&dir, "t.csv", b"question,answer\nq,1\nq,1,2\n");
    let error = read(&uneven).expect_err("three fields").to_string();
    assert!(error.ends_with("`:3: it has 3 fields, the first row names 2"), "{error}");
}

#[test]
fn fields_are_found_by_the_names_that_others_give_them() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let user = |text: &str| Asked::Conversation(vec![Message::user(text)]);
    for (row, question, answer, chosen) in [
        // Of TRL.
        (r#"{"prompt": [{"role": "user", "content": "1+1?"}], "solution": "2"}"#, user("1+1?"), "2", "from `prompt`"),
        (r#"{"prompt": "1+1?", "solution": "2"}"#, Asked::Question("1+1?".into()), "2", "answers from `solution`"),
        // Of verl.
        (
            r#"{"data_source": "x", "prompt": [{"content": "1+1?", "role": "user"}], "reward_model": {"ground_truth": "2", "style": "rule"}}"#,
            user("1+1?"),
            "2",
            "answers from `reward_model.ground_truth`",
        ),
        (
            r#"{"problem": "1+1?", "answer": null, "final_answer": 2}"#,
            Asked::Question("1+1?".into()),
            "2",
            "`final_answer`",
        ),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}], "answer": "2"}"#,
            user("1+1?"),
            "2",
            "from `messages`",
        ),
    ] {
        let (fields, found) = read(&file(&dir, "t.jsonl", row.as_bytes())).expect("read");
        assert_eq!(found, [Ok((question, answer.to_owned()))], "{row}");
        assert!(fields.as_ref().is_some_and(|fields| fields.contains(chosen)), "{row}: {fields:?}");
    }
    let own = file(&dir, "t.jsonl", br#"{"question": "q", "answer": "a", "extra": {"deep": [{"gold": 7}]}}"#);
    assert_eq!(read(&own).expect("read").0, None, "what the spec says needs no word");
    let (_, found) = read_as(&own, "question", "extra.deep.0.gold").expect("read");
    assert_eq!(found, [Ok((Asked::Question("q".into()), "7".into()))]);
    let (_, found) = read_as(&own, "question", "extra").expect("read");
    assert!(found[0].as_ref().is_err_and(|error| error.contains("an object (its fields: `deep`")), "{found:?}");
}

#[test]
fn conversations_have_few_shot_messages_and_end_with_the_user() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let row = |messages: &str| format!("{{\"messages\": {messages}, \"answer\": 2}}");
    let few = r#"[{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                  {"role": "user", "content": "1+1?"}]"#
        .replace('\n', "");
    let (_, found) = read(&file(&dir, "t.jsonl", row(&few).as_bytes())).expect("read");
    let Ok((Asked::Conversation(messages), _)) = &found[0] else { panic!("{found:?}") };
    let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user"]);
    for (messages, said) in [
        (
            r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#,
            "the role `assistant`, expected `user`",
        ),
        (r#"[{"role": "user"}]"#, "`content` of message 1 is null, expected a text"),
        (r#"[{"role": "user", "content": [{"type": "image", "url": "x"}]}]"#, "one of the type `image`"),
    ] {
        let (_, found) = read(&file(&dir, "t.jsonl", row(messages).as_bytes())).expect("read");
        assert!(found[0].as_ref().is_err_and(|error| error.contains(said)), "{messages}: {found:?}");
    }
}

/// Writes columns of a Parquet file: the schema, and for each leaf what writes it.
fn write_parquet(
    path: &Path,
    schema: &str,
    compression: Compression,
    columns: &[&dyn Fn(&mut ::parquet::file::writer::SerializedColumnWriter<'_>)],
) {
    let schema = Arc::new(parse_message_type(schema).expect("a schema"));
    let properties = WriterProperties::builder().set_compression(compression).build();
    let file = std::fs::File::create(path).expect("created");
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).expect("a writer");
    let mut group = writer.next_row_group().expect("a row group");
    for write in columns {
        let mut column = group.next_column().expect("a column").expect("one more");
        write(&mut column);
        column.close().expect("closed");
    }
    group.close().expect("closed");
    writer.close().expect("closed");
}

fn bytes(texts: &[&str]) -> Vec<ByteArray> {
    texts.iter().map(|text| ByteArray::from(*text)).collect()
}

#[test]
fn parquet_is_read_with_every_codec() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("t.parquet");
    let schema = "message rows { required binary problem (UTF8); required int64 answer; }";
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
    ] {
        write_parquet(
            &path,
            schema,
            compression,
            &[
                &|column| {
                    column.typed::<ByteArrayType>().write_batch(&bytes(&["one", "two"]), None, None).expect("written");
                },
                &|column| {
                    column.typed::<Int64Type>().write_batch(&[9_007_199_254_740_993, -2], None, None).expect("written");
                },
            ],
        );
        let found = texts(&path);
        let expected = [("one".to_owned(), "9007199254740993".to_owned()), ("two".to_owned(), "-2".to_owned())];
        assert_eq!(found, expected, "{compression}");
    }
}

#[test]
fn the_case_of_zstd_is_read() {
    let found = texts(&case("parquet-zstd/bigmath_polars.parquet"));
    assert!(
        found.iter().any(|(question, answer)| question.starts_with("Weng earns $12 an hour") && answer == "10"),
        "{found:?}"
    );
    assert_eq!(count_rows(&case("parquet-zstd/bigmath_polars.parquet")).expect("counted"), found.len());
}

/// The shape of verl and of DAPO: messages and a nested reference.
#[test]
fn messages_and_nested_references_of_parquet_are_read() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("t.parquet");
    let schema = "message rows {
        optional group prompt (LIST) { repeated group list { optional group element {
            optional binary content (UTF8); optional binary role (UTF8); } } }
        optional group reward_model { optional binary ground_truth (UTF8); optional binary style (UTF8); }
    }";
    let text = |texts: &'static [&'static str], levels: &'static [i16], repeats: Option<&'static [i16]>| {
        move |column: &mut ::parquet::file::writer::SerializedColumnWriter<'_>| {
            column.typed::<ByteArrayType>().write_batch(&bytes(texts), Some(levels), repeats).expect("written");
        }
    };
    let content = text(&["Be brief.", "1+1?", "2+2?"], &[4, 4, 4], Some(&[0, 1, 0]));
    let role = text(&["system", "user", "user"], &[4, 4, 4], Some(&[0, 1, 0]));
    let truth = text(&["2", "4"], &[2, 2], None);
    let style = text(&["rule", "rule"], &[2, 2], None);
    write_parquet(&path, schema, Compression::SNAPPY, &[&content, &role, &truth, &style]);
    let (fields, found) = read(&path).expect("read");
    assert_eq!(fields.as_deref(), Some("questions from `prompt`, answers from `reward_model.ground_truth`"));
    let first = Asked::Conversation(vec![Message::system("Be brief."), Message::user("1+1?")]);
    let second = Asked::Conversation(vec![Message::user("2+2?")]);
    assert_eq!(found, [Ok((first, "2".into())), Ok((second, "4".into()))]);
}

#[test]
fn numbers_of_parquet_are_exact_or_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("t.parquet");
    let schema = "message rows { required binary question (UTF8); required double answer; required int64 price (DECIMAL(18, 2)); }";
    write_parquet(
        &path,
        schema,
        Compression::UNCOMPRESSED,
        &[
            &|column| {
                column.typed::<ByteArrayType>().write_batch(&bytes(&["a", "b", "c"]), None, None).expect("written");
            },
            &|column| {
                column.typed::<DoubleType>().write_batch(&[0.1, f64::NAN, f64::INFINITY], None, None).expect("written");
            },
            &|column| {
                column.typed::<Int64Type>().write_batch(&[12345, -5, 700], None, None).expect("written");
            },
        ],
    );
    let (_, found) = read(&path).expect("read");
    assert_eq!(found[0].as_ref().map(|(_, answer)| answer.as_str()), Ok("0.1"));
    assert!(found[1].as_ref().is_err_and(|error| error.contains("`answer` is not a number (NaN)")), "{found:?}");
    assert!(found[2].as_ref().is_err_and(|error| error.contains("`answer` is infinite")), "{found:?}");
    let (_, found) = read_as(&path, "question", "price").expect("read");
    let prices: Vec<&str> = found.iter().map(|row| row.as_ref().map_or("", |(_, answer)| answer.as_str())).collect();
    assert_eq!(prices, ["123.45", "-0.05", "7"]);
}
