//! Writes the valid examples of a target down, for the fuzzer to begin with:
//! `cargo run --manifest-path tests/fuzz/Cargo.toml --example corpus -- job_spec tests/fuzz/corpus/job_spec`.

use std::path::PathBuf;

use pacs_fuzz::mutate::Any;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(target), Some(folder)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: corpus TARGET FOLDER");
        std::process::exit(2);
    };
    let examples = match target.as_str() {
        "job_spec" => pacs_fuzz::job_spec::examples(),
        #[cfg(feature = "data")]
        "data_file" => pacs_fuzz::data_file::examples(),
        #[cfg(feature = "data")]
        "model_folder" => pacs_fuzz::model_folder::examples(),
        #[cfg(feature = "coordinator")]
        "run_folder" => pacs_fuzz::run_folder::examples(),
        #[cfg(feature = "torch")]
        "gguf" => pacs_fuzz::gguf::examples(),
        #[cfg(feature = "torch")]
        "safetensors" => pacs_fuzz::safetensors::examples(),
        "calls" => (0..8).map(|seed| noise(seed)).collect(),
        _ => {
            eprintln!("there is no target `{target}` (gguf and safetensors need --features torch)");
            std::process::exit(2);
        }
    };
    let folder = PathBuf::from(folder);
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    for (place, example) in examples.iter().enumerate() {
        std::fs::write(folder.join(format!("example-{place}")), example).expect("the folder can be written to");
    }
    println!("{} examples in {}", examples.len(), folder.display());
}

fn noise(seed: u64) -> Vec<u8> {
    let mut any = Any::new(seed);
    (0..4000).map(|_| any.next() as u8).collect()
}
