//! Conversations as tokens, as the model will meet them: what stands in front of an answer when it is generated is
//! context, the answer up to its end token is learnt.

use std::path::Path;

use anyhow::{Context, Result, bail};
use pacs_learner::Text;
use pacs_model::ModelConfig;
use pacs_text::{ChatTemplate, Message, Tokenizer};
use serde_json::Map;

use super::rows::ASSISTANT;

/// Writes conversations down for one model.
pub(super) struct Writer {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    end_tokens: Vec<u32>,
}

impl Writer {
    /// The writer of the model in `folder`; `other` is a file whose template takes the place of the folder's.
    pub(super) fn new(folder: &Path, other: Option<&Path>, config: &ModelConfig) -> Result<Self> {
        let (tokenizer, mut template) = (Tokenizer::read(folder)?, ChatTemplate::read(folder)?);
        if let Some(path) = other {
            let source = std::fs::read_to_string(path).with_context(|| format!("read `{}`", path.display()))?;
            template = template.replaced(&source, path)?;
        }
        Ok(Self { tokenizer, template, end_tokens: config.end_tokens.clone() })
    }

    /// The texts of a conversation: one, where what is written in front of each answer begins with what was written
    /// before. Templates that write earlier answers otherwise than the last one (without their reasoning, say) give one
    /// text an answer.
    pub(super) fn texts(&self, messages: &[Message]) -> Result<Vec<Text>> {
        let (mut texts, mut text, mut written) = (Vec::new(), Text::default(), String::new());
        for (i, _) in messages.iter().enumerate().filter(|(_, message)| message.role == ASSISTANT) {
            let context = self.render(&messages[..i], true)?;
            let whole = self.render(&messages[..=i], false)?;
            let Some(answer) = whole.strip_prefix(&context) else {
                bail!("the chat template does not write answer {i} behind the prompt that asks for it");
            };
            match context.strip_prefix(&written) {
                Some(next) => text.extend(&self.encode(next, text.tokens.is_empty())?, false),
                None => {
                    texts.push(std::mem::take(&mut text));
                    text.extend(&self.encode(&context, true)?, false);
                }
            }
            self.add_answer(&mut text, answer)?;
            written = whole;
        }
        texts.push(text);
        Ok(texts)
    }

    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        if self.template.is_plain() {
            // Prompt and answer as they are: an empty line between them would be one more thing to generate.
            return Ok(messages.iter().map(|message| message.content.as_str()).collect());
        }
        Ok(self.template.render(messages, add_generation_prompt, &Map::new())?)
    }

    fn encode(&self, text: &str, first: bool) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, first && self.template.is_plain())?)
    }

    /// An answer is learnt up to its first end token; what the template writes behind it is context.
    fn add_answer(&self, text: &mut Text, answer: &str) -> Result<()> {
        let mut tokens = self.tokenizer.encode(answer, false)?;
        let mut end = tokens.iter().position(|token| self.end_tokens.contains(token));
        if let (None, true, Some(token)) = (end, self.template.is_plain(), self.end_tokens.first()) {
            end = Some(tokens.len());
            tokens.push(*token);
        }
        let learnt = end.map_or(tokens.len(), |end| end + 1);
        text.extend(&tokens[..learnt], true);
        text.extend(&tokens[learnt..], false);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)
    }

    fn writer(folder: &Path) -> Writer {
        Writer::new(folder, None, &ModelConfig::read(folder).expect("golden model")).expect("golden tokenizer")
    }

    /// What is learnt of each text, and the whole of it.
    fn written(writer: &Writer, messages: &[(&str, &str)]) -> Vec<(String, String)> {
        let message = |(role, content): &(&str, &str)| Message { role: role.to_string(), content: content.to_string() };
        let messages: Vec<Message> = messages.iter().map(message).collect();
        let decode = |tokens: &[u32]| writer.tokenizer.decode(tokens, false).expect("known tokens");
        let texts = writer.texts(&messages).expect("a conversation");
        let parts = texts.iter().map(|text| {
            let learnt: Vec<u32> =
                text.tokens.iter().zip(&text.learnt).filter(|(_, learnt)| **learnt).map(|(token, _)| *token).collect();
            (decode(&learnt), decode(&text.tokens))
        });
        parts.collect()
    }

    #[test]
    fn answers_are_learnt_up_to_their_end() {
        let turns = [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "4")];
        for (model, one_text) in [("llama3", true), ("qwen2-tied", true), ("qwen3", false)] {
            let parts = written(&writer(&golden(model)), &turns);
            assert_eq!(parts.len(), if one_text { 1 } else { 2 }, "{model}: {parts:?}");
            let learnt: String = parts.iter().map(|part| part.0.as_str()).collect();
            let (first, second) = learnt.split_once('2').expect("the first answer");
            assert!(!first.contains("1+1") && second.contains('4') && !second.contains("2+2"), "{model}: {learnt}");
            let whole = &parts.last().expect("a text").1;
            assert!(whole.contains("1+1?") && whole.contains("2+2?"), "{model}: {whole}");
        }
        let parts = written(&writer(&golden("qwen2-tied")), &turns);
        assert_eq!(parts[0].0, "2<|im_end|>4<|im_end|>");
    }

    #[test]
    fn without_a_template_prompt_and_answer_stand_as_they_are() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in ["config.json", "tokenizer.json"] {
            std::fs::copy(golden("qwen2-tied").join(name), folder.path().join(name)).expect("copied");
        }
        let writer = writer(folder.path());
        let end = writer.tokenizer.decode(&writer.end_tokens[..1], false).expect("a token");
        let parts = written(&writer, &[("user", "1+1="), ("assistant", "2")]);
        assert_eq!(parts, [(format!("2{end}"), format!("1+1=2{end}"))]);
    }
}
