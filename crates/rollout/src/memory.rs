//! How large the cache becomes when nobody says.

use pacs_model::ModelConfig;
use pacs_torch::tch::{Device, Kind};
use pacs_torch::{BLOCK_TOKENS, device_memory, memory_bytes};

use crate::Engine;

/// Share of the memory that the cache may take: the weights, the passes, and on one machine the learner need some, too.
const SHARE: f64 = 0.4;
/// The same of the whole of a GPU that other workers use, too: a learner plans with a little more than half of it.
const SHARED: f64 = 0.2;
/// Memory of a system that does not say.
const UNKNOWN_BYTES: u64 = 4 << 30;

/// Tokens of a cache for `rows` samples of at most `longest` tokens, prompt and answer: as many as they could ever need, or
/// what fits into a share of the memory of `device`, a smaller one where others use it, too; one sample always fits.
#[must_use]
pub fn cache_tokens(
    config: &ModelConfig,
    kind: Kind,
    device: Device,
    is_shared: bool,
    [rows, longest]: [usize; 2],
) -> usize {
    let free = memory_bytes(device).unwrap_or(UNKNOWN_BYTES) as f64 * SHARE;
    let total = device_memory(device).filter(|_| is_shared).map(|(_, total)| total as f64 * SHARED);
    let budget = total.map_or(free, |most| most.min(free)) as usize;
    // Prompt and answer each end within a block.
    let needed = longest.saturating_add(2 * BLOCK_TOKENS).saturating_mul(rows.max(1));
    let tokens = Engine::cache_tokens_within(config, kind, budget).min(needed).max(longest);
    if tokens < needed {
        tracing::info!(tokens, needed, "the cache holds less than all samples could need: when it is full, some wait");
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_cache_is_as_large_as_needed_or_as_there_is_room_for() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen3");
        let config = ModelConfig::read(&folder).expect("golden model");
        let tokens = |rows, longest| cache_tokens(&config, Kind::Float, Device::Cpu, false, [rows, longest]);
        assert_eq!(tokens(4, 100), 4 * 164);
        let room = Engine::cache_tokens_within(&config, Kind::Float, 1usize << 40);
        assert!(tokens(usize::MAX, 1000) < room, "a terabyte is more than there is");
        assert_eq!(tokens(1, room), room, "one sample always fits");
    }
}
