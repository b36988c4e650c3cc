//! Compiles `proto/` with protox, so that no system `protoc` is needed.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let files: Vec<PathBuf> =
        ["sample", "worker", "rollout", "verifier", "custom_verifier", "learner", "operator", "observe"]
            .iter()
            .map(|name| root.join(format!("pacs/v1/{name}.proto")))
            .collect();
    let descriptors = protox::compile(&files, [&root])?;
    // What reflection serves.
    let encoded = protox::prost::Message::encode_to_vec(&descriptors);
    std::fs::write(PathBuf::from(std::env::var("OUT_DIR")?).join("pacs.v1.bin"), encoded)?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
