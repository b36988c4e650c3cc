//! The parameters that this rank updates, and their places in each of its flat buffers.

use pacs_shape::{Division, ModelConfig, ParameterLayout};
use pacs_torch::tch::{Device, Kind, Tensor};

/// A run of parameters that is contiguous in every buffer and treated alike by the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// First element in the buffers of this rank's shard: master weights and moments.
    pub(crate) shard: usize,
    /// First element in a buffer of all parameters, in the sharded layout.
    pub(crate) place: usize,
    /// First element in the layout of the whole model, which is the same for any number of ranks.
    pub(crate) index: usize,
    /// Number of elements.
    pub(crate) len: usize,
    /// Whether the parameters are matrices; always true where norms and biases are not told apart.
    pub(crate) matrix: bool,
}

/// Returns the segments of this rank in order. With `matrices_apart`, matrices and other parameters
/// form separate segments.
pub(crate) fn segments(config: &ModelConfig, division: Division, matrices_apart: bool) -> Vec<Segment> {
    let whole = ParameterLayout::new(config);
    let divided = ParameterLayout::divided(config, division.parts());
    let mut segments: Vec<Segment> = Vec::new();
    for (bucket, whole_bucket) in divided.buckets().iter().zip(whole.buckets()) {
        let part = bucket.room / division.parts();
        let mine = division.part() * part..((division.part() + 1) * part).min(bucket.numel);
        let starts: Vec<(usize, bool)> = (whole.parameters().iter())
            .filter(|spec| whole_bucket.range().contains(&spec.offset))
            .map(|spec| (spec.offset - whole_bucket.offset, spec.decay || !matrices_apart))
            .collect();
        for (i, &(start, matrix)) in starts.iter().enumerate() {
            // Padding after a parameter belongs to it; its gradient is zero.
            let end = starts.get(i + 1).map_or(bucket.numel, |next| next.0);
            let start = start.max(mine.start);
            let end = end.min(mine.end);
            if start >= end {
                continue;
            }
            let segment = Segment {
                shard: bucket.offset / division.parts() + start - mine.start,
                place: bucket.offset + start,
                index: whole_bucket.offset + start,
                len: end - start,
                matrix,
            };
            match segments.last_mut().filter(|last| last.continues(&segment)) {
                Some(last) => last.len += segment.len,
                None => segments.push(segment),
            }
        }
    }
    segments
}

impl Segment {
    /// Returns the segment in `shard` if the buffer is sharded, else in `whole`.
    pub(crate) fn of(&self, shard: Option<&Tensor>, whole: &Tensor) -> Tensor {
        match shard {
            Some(shard) => part(shard, self.shard, self.len),
            None => part(whole, self.place, self.len),
        }
    }

    fn continues(&self, next: &Self) -> bool {
        let ends = |start: usize| start + self.len;
        self.matrix == next.matrix
            && (ends(self.shard), ends(self.place), ends(self.index)) == (next.shard, next.place, next.index)
    }
}

/// Returns a view of a flat buffer.
pub(crate) fn part(flat: &Tensor, start: usize, len: usize) -> Tensor {
    flat.narrow(0, start as i64, len as i64)
}

/// Allocates a float32 buffer of zeros.
pub(crate) fn zeros(elements: usize, device: Device) -> Tensor {
    Tensor::zeros([elements as i64], (Kind::Float, device))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pacs_shape::Sharding;

    use super::*;

    #[test]
    fn the_parts_of_all_ranks_are_all_parameters_once() {
        for name in ["qwen2-tied", "qwen2-untied", "qwen3", "llama3"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name);
            let config = ModelConfig::read(&folder).expect("golden model");
            let whole = ParameterLayout::new(&config);
            for ranks in 1..=5 {
                let mut owners = vec![0; whole.total()];
                let mut matrices = 0;
                for rank in 0..ranks {
                    let division = Division { sharding: Sharding::ShardAll, rank, ranks };
                    let shard = ParameterLayout::divided(&config, ranks).total() / ranks;
                    for segment in segments(&config, division, true) {
                        assert!(segment.shard + segment.len <= shard);
                        owners[segment.index..segment.index + segment.len].iter_mut().for_each(|count| *count += 1);
                        matrices += if segment.matrix { segment.len } else { 0 };
                    }
                }
                assert!(owners.iter().all(|count| *count == 1), "{name}, {ranks} ranks");
                let expected: usize =
                    whole.parameters().iter().filter(|spec| spec.decay).map(|spec| spec.numel()).sum();
                assert!((expected..expected + 64 * whole.parameters().len()).contains(&matrices));
            }
            let replicated = Division { sharding: Sharding::Replicated, rank: 2, ranks: 3 };
            let all = segments(&config, replicated, true);
            assert!(all.iter().all(|segment| segment.shard == segment.place && segment.place == segment.index));
            assert_eq!(all.iter().map(|segment| segment.len).sum::<usize>(), whole.total());
            assert_eq!(segments(&config, replicated, false).len(), 1);
        }
    }
}
