//! Files of problems and of prompts. The first byte says which kind of file the others are.
#![allow(unreachable_pub, reason = "the fuzzer's crate and tests include this file")]

use std::fs;
use std::path::Path;

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use crate::mutate::golden;

pub fn examples() -> Vec<Vec<u8>> {
    let rows = "{\"question\": \"What is 1 + 1?\", \"answer\": \"2\"}\n\n{\"question\": \"é\", \"answer\": -3.5}\n";
    let prompts = "{\"prompt\": \"a\", \"id\": 7}\n{\"messages\": [{\"role\": \"user\", \"content\": \"b\"}]}\n";
    let of = |kind: u8, text: &[u8]| [&[kind], text].concat();
    vec![of(0, rows.as_bytes()), of(1, prompts.as_bytes()), of(2, &parquet_file())]
}

fn parquet_file() -> Vec<u8> {
    let schema = parse_message_type("message m { required binary question (UTF8); required binary answer (UTF8); }");
    let properties = WriterProperties::builder().build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema.unwrap().into(), properties.into()).unwrap();
    let mut rows = writer.next_row_group().unwrap();
    for values in [["1 + 1", "2 + 2"], ["2", "4"]] {
        let mut column = rows.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values.map(ByteArray::from), None, None).unwrap();
        column.close().unwrap();
    }
    rows.close().unwrap();
    writer.into_inner().unwrap()
}

/// A file is refused with its place in it, or is read.
pub fn check(bytes: &[u8]) {
    let Some((kind, content)) = bytes.split_first() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = golden("qwen2-tied");
    let name = if kind % 3 == 2 { "train.parquet" } else { "train.jsonl" };
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    let text = format!(
        "name = 'x'\nmodel.path = '{}'\ndata.train.path = '{}'\nrollout.max_new_tokens = 64\n\
         evaluation = {{ before = false, after = false, every_steps = 0 }}\n",
        model.display(),
        path.display()
    );
    let spec = pacs_spec::parse(&text, Path::new("job.toml")).unwrap_or_else(|errors| panic!("{errors}"));
    if kind % 3 == 1 {
        let prompter = pacs_data::Prompter::read(&model, None, String::new()).unwrap();
        if let Err(error) = pacs_data::read_prompts(&mut &*content, &path, &prompter) {
            assert!(error.to_string().contains("train"), "{error}");
        }
        return;
    }
    drop(pacs_data::count_rows(&path));
    match pacs_data::load(&spec) {
        Ok(problems) => assert!(!problems.train.is_empty()),
        Err(error) => assert!(error.to_string().contains("train"), "{error}"),
    }
}
